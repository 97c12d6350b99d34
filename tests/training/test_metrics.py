import pytest
import torch

from elman.training.metrics import PendingRows


class Copied:
    """An event that tells whether it was waited for."""

    waited = 0

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Copied.waited += 1


class OnDevice(torch.Tensor):
    """A tensor of the CPU that takes itself for one of a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def test_rows_come_back_in_order_with_their_numbers() -> None:
    pending = PendingRows()
    for step in range(3):
        pending.put({"step": step}, torch.tensor([step, 0.5]))
    assert list(pending.take(everything=False)) == [({"step": step}, [step, 0.5]) for step in range(3)]
    assert list(pending.take(everything=True)) == []


def test_the_newest_row_of_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Copied)
    monkeypatch.setattr(Copied, "waited", 0)
    pending = PendingRows()
    for step in range(3):
        pending.put({"step": step}, torch.tensor([step]).as_subclass(OnDevice))
    assert [row["step"] for row, _ in pending.take(everything=False)] == [0, 1]
    assert Copied.waited == 2
    assert list(pending.take(everything=False)) == []
    assert [row["step"] for row, _ in pending.take(everything=True)] == [2]
    assert Copied.waited == 3


@pytest.mark.gpu
def test_numbers_of_a_gpu_arrive() -> None:
    pending = PendingRows()
    for step in range(100):
        pending.put({"step": step}, torch.full((3,), float(step), device="cuda"))
    taken = list(pending.take(everything=False)) + list(pending.take(everything=True))
    assert taken == [({"step": step}, [step] * 3) for step in range(100)]

"""The choice of a backend: what auto takes, and what an explicit choice that cannot run says."""

import dataclasses

import pytest
import torch

from elman.errors import UsageError
from elman.ops import BACKENDS, backend_status, backends, recurrence
from elman.ops.cells import CELLS, Cell
from elman.ops.operators import Dense
from tests.ops.problems import draw

ODD = Cell("odd", "h = pre", None, lambda pre, rec, memory: ((pre[0],), ()), lambda *args: ((), (), args[-1]))


def problem(device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> backends.Problem:
    return backends.Problem(8, 4, 16, dtype, torch.device(device), Dense, CELLS["tanh"])


def test_auto_on_the_cpu_is_the_reference() -> None:
    assert backends.choose("auto", problem("cpu")) == "reference"
    p = draw(3, 2, 4)
    h, _ = recurrence(p.pre.requires_grad_(), p.weight)
    (first,) = torch.autograd.grad(h.square().sum(), p.pre, create_graph=True)
    assert torch.autograd.grad(first.sum(), p.pre)[0].isfinite().all()


def test_auto_on_a_gpu_is_the_last_that_can_and_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    able = dataclasses.replace(BACKENDS["persistent"], why_not=lambda p: None, pays=lambda p: p.batch_size < 100)
    monkeypatch.setitem(BACKENDS, "persistent", able)
    assert backends.choose("auto", problem()) == "persistent"
    assert backends.choose("auto", dataclasses.replace(problem(), batch_size=100)) == "loop"
    unable = dataclasses.replace(able, why_not=lambda p: "no")
    monkeypatch.setitem(BACKENDS, "persistent", unable)
    assert backends.choose("auto", problem()) == "loop"


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CELLS, "odd", ODD)
    p = draw(2, 2, 4, dtype=torch.float32)
    with pytest.raises(UsageError, match=r"backend='loop' cannot run this problem: .*cell='odd'.*backend='reference'"):
        recurrence(p.pre, p.weight, cell="odd", backend="loop")
    h, _ = recurrence(p.pre, p.weight, cell="odd", backend="auto")
    assert torch.equal(h, p.pre)


def test_every_backend_reports_its_status() -> None:
    status = backend_status()
    assert [name for name, _, _ in status] == list(BACKENDS)
    assert all(isinstance(available, bool) and reason for _, available, reason in status)
    assert status[0] == ("reference", True, "every cell, operator, dtype and device, in plain PyTorch")
    if not torch.cuda.is_available():
        assert [available for _, available, _ in status] == [True] + [False] * (len(status) - 1)

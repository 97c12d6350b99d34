import json
from pathlib import Path

import pytest
import torch

from elman.training.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"w": torch.full((3, 2), float(step))}, {"seconds": 1.5, "rng": torch.arange(4)})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path, checkpoint(7)))
    assert loaded.step == 7
    assert torch.equal(loaded.model["w"], torch.full((3, 2), 7.0))
    assert loaded.trainer is not None
    assert loaded.trainer["seconds"] == 1.5
    assert load_checkpoint(list_checkpoints(tmp_path)[-1], with_trainer=False).trainer is None


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".partial-1").mkdir()
    for step in (5, 100, 20, 1000):
        save_checkpoint(tmp_path, checkpoint(step))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000100", "step-00001000"]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(1))

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, checkpoint(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path / "step-00000001").step == 1


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "garbage"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: str) -> None:
    path = save_checkpoint(tmp_path, checkpoint(3))
    content = bytearray((path / name).read_bytes())
    if damage == "missing":
        (path / name).unlink()
    elif damage == "truncated":
        (path / name).write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        (path / name).write_bytes(b"\xff\x00nonsense")
    else:
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    if (name, damage) == ("manifest.json", "one bit"):
        with pytest.raises(DamagedCheckpointError):
            load_checkpoint(path)
        return
    with pytest.raises(DamagedCheckpointError, match=r"step-00000003 is damaged"):
        load_checkpoint(path)


def test_a_foreign_folder_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(3))
    (path / "manifest.json").write_text(json.dumps({"format": "other", "files": {}}))
    with pytest.raises(DamagedCheckpointError, match="not one of elman's"):
        load_checkpoint(path)


def test_loading_executes_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    path = save_checkpoint(tmp_path, Checkpoint(1, {}, {"bomb": Bomb()}))
    with pytest.raises(DamagedCheckpointError, match=r"(?i)weights.only"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()

"""What most tests of training begin with: a small text, and a run on it that takes a moment."""

from pathlib import Path

import pytest

from elman.training.config import TrainConfig


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(
        b"".join(b"the quick brown fox %d jumps over the lazy dog %d\n\x1e" % (i, i * i) for i in range(800))
    )
    return path


@pytest.fixture
def config(tmp_path: Path, text: Path) -> TrainConfig:
    return TrainConfig(
        data=text, out=tmp_path / "run", dim=16, depth=2, seq_len=32, batch_size=8, steps=12, warmup=2, lr=1e-2,
        device="cpu", eval_every=5, save_every=4, eval_bytes="500",
    )  # fmt: skip

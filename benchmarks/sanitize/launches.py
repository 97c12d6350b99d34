"""A launch of a kernel with all that it read and wrote, as a file keeps it; knows nothing of PyTorch."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

_FILE = "launches.pickle"


@dataclass(frozen=True)
class Buffer:
    """A run of GPU memory, in bytes.

    Attributes:
        before, after: its contents before the launch and after it; ``after`` is None where no launch need repeat it.
        written_only: whether it held nothing before the launch.
    """

    before: np.ndarray
    after: np.ndarray | None
    written_only: bool = False


class Place(NamedTuple):
    """An address: that of byte ``offset`` of a buffer."""

    buffer: int
    offset: int


@dataclass(frozen=True)
class Launch:
    """Attributes beside those of ``elman.ops.cuda.launch``:

    Attributes:
        family: of kernels, a row of the table.
        words: what was computed.
        symbol: of the kernel in the cubin.
        grid: blocks, in three dimensions.
        arguments: of 8 bytes each.
        buffers: what the arguments point to; no two overlap.
    """

    family: str
    words: str
    cubin: bytes
    symbol: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    cluster: int | None
    cooperative: bool
    arguments: Sequence[Place | int | float]
    buffers: Sequence[Buffer]


def save(launches: Sequence[Launch], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_bytes(pickle.dumps(launches))


def load(folder: Path) -> list[Launch]:
    """Those that were saved there; none if nothing was."""
    if not (folder / _FILE).exists():
        return []
    launches: list[Launch] = pickle.loads((folder / _FILE).read_bytes())
    return launches

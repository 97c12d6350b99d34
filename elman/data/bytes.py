"""A raw file as training data: memory-mapped, split into a training part and a held-out tail."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elman.errors import UsageError

Bytes = npt.NDArray[np.uint8]

#: The byte that ends every document: ASCII "record separator".
DELIMITER = 0x1E
#: The held-out tail starts at most this far from the end of the file, before it is moved to a document's start.
MAX_HELDOUT = 10_000_000
# How far back from there a document's start is looked for. A file without delimiters is cut where it falls.
_SEARCH = 4 << 20


@dataclass(frozen=True)
class ByteData:
    """A raw file in two parts that share no byte. Both are views of one memory map: nothing is read before use."""

    path: Path
    train: Bytes
    heldout: Bytes

    def fingerprint(self) -> str:
        """A hash of both sizes and of 64 windows spread over the file: equal for an equal file, at any path."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.heldout)}".encode())
        for part in (self.train, self.heldout):
            for start in np.linspace(0, len(part), 32, endpoint=False).astype(np.int64):
                digest.update(part[start : start + 4096].tobytes())
        return digest.hexdigest()


def open_bytes(path: Path, heldout_fraction: float = 0.05) -> ByteData:
    """Map a raw file and split off its tail, as ``split_tail`` does. Raises as ``map_bytes`` and ``split_tail``."""
    return split_tail(path, map_bytes(path, "--data", mmap.MADV_RANDOM), heldout_fraction)


def split_tail(path: Path, data: Bytes, heldout_fraction: float = 0.05) -> ByteData:
    """Split off the tail of the file's bytes.

    The tail is the last ``heldout_fraction`` of the file or its last 10 MB, whichever is less, moved back to just
    after a delimiter where there is one within 4 MiB, so that no document lies in both parts.

    Raises:
        UsageError: a fraction outside (0, 0.5].
    """
    if not 0 < heldout_fraction <= 0.5:
        raise UsageError(f"--heldout {heldout_fraction} is out of range: give a fraction above 0 and up to 0.5")
    target = len(data) - min(int(len(data) * heldout_fraction), MAX_HELDOUT)
    start = max(0, target - _SEARCH)
    delimiters = np.flatnonzero(data[start:target] == DELIMITER)
    cut = start + int(delimiters[-1]) + 1 if len(delimiters) else target
    return ByteData(path, data[:cut], data[cut:])


def map_bytes(path: Path, option: str, advice: int = mmap.MADV_SEQUENTIAL) -> Bytes:
    """The whole file as a read-only memory map.

    Args:
        path: of the file.
        option: what the user named it by.
        advice: how it will be read, as ``madvise`` takes it; windows from anywhere need no reading ahead.

    Raises:
        UsageError: no such file, a folder, empty, compressed or unreadable.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UsageError(f"{option} {path} is no regular file: write its text to a file first")
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise UsageError(f"{option} {path} is empty: give a file of raw text, or make one by `elman data pack`")
            file.seek(0)
            if file.read(6).startswith((b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"BZh", b"PK\x03\x04")):
                raise UsageError(f"{option} {path} is compressed: unpack it first; `elman data pack` reads gzip itself")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UsageError(
            f"{option} {path}: no such file; check the path, or make the file by `elman data pack`"
        ) from None
    except IsADirectoryError:
        raise UsageError(
            f"{option} {path} is a folder: make one file of it first, `elman data pack {path} --out FILE`"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{option} {path} cannot be read: {reason}; check the path and its permissions") from None
    mapped.madvise(advice)
    return np.frombuffer(mapped, dtype=np.uint8)


def gather(tokens: npt.NDArray[Any], starts: npt.NDArray[np.int64], seq_len: int) -> npt.NDArray[Any]:
    """The windows of ``seq_len + 1`` tokens that begin at ``starts``: (len(starts), seq_len + 1)."""
    out = np.empty((len(starts), seq_len + 1), dtype=tokens.dtype)
    for row, start in zip(out, starts, strict=True):
        row[:] = tokens[start : start + seq_len + 1]
    return out


def heldout_starts(
    tokens: npt.NDArray[Any], seq_len: int, max_tokens: int, unit: str = "byte"
) -> npt.NDArray[np.int64]:
    """Starts of windows that cover the held-out part end to end, thinned evenly to at most ``max_tokens`` predictions.

    Raises:
        UsageError: not one window fits.
    """
    available = (len(tokens) - 1) // seq_len
    if available < 1:
        raise UsageError(
            f"--seq-len {seq_len} needs windows of {seq_len + 1} {unit}s, but the held-out part has {len(tokens)}: "
            f"give a shorter --seq-len, a larger --heldout or a larger --data"
        )
    count = min(available, max(1, max_tokens // seq_len))
    return np.linspace(0, available - 1, count).astype(np.int64) * seq_len

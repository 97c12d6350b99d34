"""What a packed file holds: documents, their lengths, its bytes."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elman.data.bytes import DELIMITER, Bytes

_CHUNK = 1 << 24
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class DataInfo:
    """Facts about a raw file.

    Attributes:
        size: bytes.
        documents: how many, one that the file ends without a delimiter included.
        unterminated: whether the file ends without a delimiter.
        length_quantiles: bytes a document, delimiter left out, at ``QUANTILES``.
        histogram: (256,), how often each byte occurs.
    """

    size: int
    documents: int
    unterminated: bool
    length_quantiles: tuple[int, ...]
    histogram: npt.NDArray[np.int64]

    @property
    def entropy(self) -> float:
        """Bits a byte that a model of byte frequencies alone would need."""
        p = self.histogram[self.histogram > 0] / self.size
        return float(-(p * np.log2(p)).sum())


def describe(data: Bytes, progress: Callable[[int], None] = lambda read: None) -> DataInfo:
    """Read the file once, in pieces. Keeps 8 bytes a document."""
    histogram = np.zeros(256, dtype=np.int64)
    ends = array("q")
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        histogram += np.bincount(chunk, minlength=256)
        ends.frombytes((np.flatnonzero(chunk == DELIMITER) + start).astype(np.int64).tobytes())
        progress(len(chunk))
    unterminated = data[-1] != DELIMITER
    if unterminated:
        ends.append(len(data))
    lengths = np.diff(np.frombuffer(ends, dtype=np.int64), prepend=-1) - 1
    quantiles = np.quantile(lengths, QUANTILES, method="nearest")
    return DataInfo(len(data), len(lengths), bool(unterminated), tuple(int(q) for q in quantiles), histogram)

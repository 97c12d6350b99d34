"""What a training step reads: a pure function of the seed and the step.

A sampler gives the places of the training part where the rows of a step's batch start. Ranks take consecutive rows, so
a run resumed, or resumed on another number of ranks, reads the same bytes in the same order.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from elman.data.bytes import DELIMITER, Bytes
from elman.data.vocabulary import BYTES, Tokens, Vocabulary
from elman.errors import UsageError

Starts = npt.NDArray[np.int64]

_DELIMITER: Bytes = np.array([DELIMITER], dtype=np.uint8)


class Batch(NamedTuple):
    """Rows of a step.

    Attributes:
        tokens: (B, seq_len + 1), the inputs and, one further, the targets; (B, seq_len), the inputs alone, where
            there are ``targets``.
        reset: (B, seq_len) bool, true where an input starts a document; None where documents are not told apart.
        targets: (B, seq_len), what each input is to be answered by, where that is not the token behind it.
    """

    tokens: Tokens
    reset: npt.NDArray[np.bool_] | None
    targets: Tokens | None = None


class Batches(Protocol):
    """The rows of every step, a function of the step alone."""

    #: Whether a document's start resets the model's state.
    resets: ClassVar[bool]
    #: Whether a row goes on where that of the step before ended, and so does the model's state.
    carries_state: ClassVar[bool]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of a step's batch that fall to a rank, an even share of them."""
        ...


@dataclass(frozen=True)
class Ring:
    """The training part read round and round. Where it does not end with a delimiter, one follows its last byte."""

    data: Bytes

    @functools.cached_property
    def size(self) -> int:
        """Bytes once round."""
        return len(self.data) + int(self.data[-1] != DELIMITER)

    def read(self, start: int, count: int) -> Bytes:
        """``count`` bytes, at least 1, from ``start`` on, any whole number."""
        start %= self.size
        if start + count <= len(self.data):
            return self.data[start : start + count]
        pieces = []
        while count > 0:
            pieces.append(self.data[start : start + count] if start < len(self.data) else _DELIMITER)
            start, count = (start + len(pieces[-1])) % self.size, count - len(pieces[-1])
        return np.concatenate(pieces)


def document_starts(tokens: Tokens, first: bool | npt.NDArray[np.bool_], delimiter: int) -> npt.NDArray[np.bool_]:
    """Where documents start: behind a delimiter. tokens (B, T + 1), whether one does at each row's first -> (B, T)."""
    reset = np.empty((len(tokens), tokens.shape[1] - 1), dtype=np.bool_)
    reset[:, 0] = first
    reset[:, 1:] = tokens[:, :-2] == delimiter
    return reset


@dataclass(frozen=True)
class Reading:
    """What is read, and how much of it a step.

    Attributes:
        data: the training part.
        seq_len: inputs a row.
        batch_size: rows a step, those of all ranks.
        seed: of what is drawn.
        vocabulary: of the tokens that rows are made of.
    """

    data: Bytes
    seq_len: int
    batch_size: int
    seed: int
    vocabulary: Vocabulary = BYTES

    #: Whether a document's start resets the model's state.
    resets: ClassVar[bool] = True
    #: Whether a row goes on where that of the step before ended, and so does the model's state.
    carries_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if len(self.data) < self.seq_len + 1:
            raise UsageError(
                f"--seq-len {self.seq_len} needs windows of {self.seq_len + 1} {self.vocabulary.unit}s, but the "
                f"training part has {len(self.data)} bytes: give a shorter --seq-len or a larger --data"
            )


@dataclass(frozen=True)
class Sampler(Reading, ABC):
    """The rows of every step, a function of the step alone."""

    @abstractmethod
    def starts(self, step: int) -> Starts:
        """(batch_size,), where the rows of a step start."""

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of a step's batch that fall to a rank, ``batch_size / world_size`` of them."""
        assert self.batch_size % world_size == 0
        rows = self.batch_size // world_size
        starts = self.starts(step)[rank * rows : (rank + 1) * rows]
        ring = Ring(self.data)
        tokens = np.concatenate([self._read(ring, start) for start in starts.tolist()]).reshape(rows, -1)
        if not self.resets:
            return Batch(tokens, None)
        first = (starts == 0) | (self.data[starts - 1] == DELIMITER)
        # A row that nothing came before starts anew, wherever it is.
        return Batch(tokens, document_starts(tokens, first | (step == 0), self.vocabulary.delimiter))

    def _read(self, ring: Ring, start: int) -> Tokens:
        """The ``seq_len + 1`` tokens from ``start`` on."""
        count = self.seq_len + 1
        size = count * self.vocabulary.bytes_per_token
        while True:
            tokens = self.vocabulary.encode(ring.read(start, size))
            if len(tokens) >= count + self.vocabulary.lookahead:
                return tokens[:count]
            size *= 2

    def _draw(self, step: int, below: int) -> Starts:
        """(batch_size,), uniform over 0 to ``below - 1``."""
        # A counter-based generator: the step is a place in its stream, not the outcome of the steps before.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
        return generator.integers(0, below, size=self.batch_size)


@dataclass(frozen=True)
class WindowSampler(Sampler):
    """Windows from anywhere. A delimiter in one is a byte like any other: the state runs on through it."""

    resets: ClassVar[bool] = False

    def starts(self, step: int) -> Starts:
        drawn = self._draw(step, len(self.data) - self.seq_len)
        return np.array([self.vocabulary.first_start(self.data, place) for place in drawn.tolist()], dtype=np.int64)


@dataclass(frozen=True)
class DocumentSampler(Sampler):
    """Documents one behind the other, each from a state at rest; the row's end cuts the last.

    A place is drawn. The row starts with the document that it lies in or, where that began more than a row before,
    at the place: so the middle of long documents is read too.
    """

    def starts(self, step: int) -> Starts:
        return np.array([self._start(place) for place in self._draw(step, len(self.data)).tolist()], dtype=np.int64)

    def _start(self, place: int) -> int:
        begin = max(0, place - self.seq_len * self.vocabulary.bytes_per_token)
        delimiter = self.data[begin:place].tobytes().rfind(DELIMITER)
        if delimiter >= 0:
            return begin + delimiter + 1
        return 0 if begin == 0 else self.vocabulary.first_start(self.data, place)


def check_streams(reading: Reading) -> None:
    """A step's streams, a row each, do not overlap.

    Raises:
        UsageError: there are too few bytes.
    """
    wanted = reading.batch_size * reading.seq_len
    if wanted > len(reading.data):
        raise UsageError(
            f"--sampling tbptt reads --batch-size {reading.batch_size} streams by --seq-len {reading.seq_len} "
            f"{reading.vocabulary.unit}s, but the training part has {len(reading.data)} bytes, not {wanted}: give a "
            f"smaller --batch-size, a shorter --seq-len or a larger --data"
        )


@dataclass(frozen=True)
class StreamSampler(Sampler):
    """Streams that never end, one a row: a step reads the next ``seq_len`` bytes of each (truncated BPTT).

    Row i starts at the i-th of ``batch_size`` even parts of the training part and goes round and round: behind its part
    comes that of row i + 1, behind the last byte the first. So every byte is read once while each row reads as much as
    its part has (where the parts are a byte apart, those at their edges once more), and nowhere does a stream jump.
    """

    carries_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_streams(self)

    def starts(self, step: int) -> Starts:
        size = Ring(self.data).size
        parts = np.arange(self.batch_size, dtype=np.int64) * size // self.batch_size
        return (parts + step * self.seq_len) % size


SAMPLERS: dict[str, type[Sampler]] = {"windows": WindowSampler, "documents": DocumentSampler, "tbptt": StreamSampler}

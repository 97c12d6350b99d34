"""Streams of tokens that never end, for truncated BPTT: where one is depends on what it read before, and is saved.

How many bytes a token has is known only once it is made, so unlike a sampler's, the rows of a step are no function of
the step alone, but of it and each stream's *place*. Places are numbers that a checkpoint keeps; the rest follows from
them, whatever the number of ranks or workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from elman.data.bytes import DELIMITER
from elman.data.sampling import Batch, Reading, Ring, check_streams, document_starts
from elman.data.vocabulary import Tokens

#: (B, 2), of each stream: its block, and how many of the block's tokens it has read.
Places = npt.NDArray[np.int64]

#: The training part is cut into blocks of at most about this many bytes.
_BLOCK = 1 << 12


@dataclass(frozen=True)
class TokenStreams(Reading):
    """A stream of tokens a row: a step reads the next ``seq_len`` of each.

    The training part, read round and round, is cut into equal blocks at fixed places, each moved to a character's
    start, and each block is made tokens by itself: one token in a thousand is cut. So the tokens of the whole file
    are fixed, and no stream reads a byte twice or leaves one out where it went on from a saved place. Row i starts at
    the i-th of ``batch_size`` even parts, which are whole blocks, and goes on through that of row i + 1.
    """

    carries_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_streams(self)

    @property
    def blocks(self) -> int:
        """How many there are, the same number for each row."""
        return self.batch_size * -(-Ring(self.data).size // (self.batch_size * _BLOCK))

    def first_places(self) -> Places:
        """Where the streams start."""
        rows = np.arange(self.batch_size, dtype=np.int64) * (self.blocks // self.batch_size)
        return np.stack((rows, np.zeros_like(rows)), axis=1)

    def batches(self, step: int, places: Places) -> Iterator[tuple[Batch, Places]]:
        """From a step on, batches of the rows that have these places, and their places behind each."""
        rows = [_Row(self, *place) for place in places.tolist()]
        for now in itertools.count(step):
            read = [row.read(self.seq_len) for row in rows]
            tokens = np.stack([tokens for tokens, _ in read])
            # Before the first step every stream is at rest.
            first = np.array([starts for _, starts in read]) | (now == 0)
            yield (
                Batch(tokens, document_starts(tokens, first, self.vocabulary.delimiter)),
                np.array([row.place for row in rows], dtype=np.int64),
            )

    def block(self, number: int) -> Tokens:
        """The tokens of a block."""
        start, end = self.edge(number), self.edge(number + 1)
        return self.vocabulary.encode(Ring(self.data).read(start, end - start)) if start < end else np.array([], int)

    def edge(self, number: int) -> int:
        """The byte at which a block starts; behind the last one, the size."""
        size = Ring(self.data).size
        if number in (0, self.blocks):
            return number // self.blocks * size
        return self.vocabulary.first_start(self.data, number * size // self.blocks)


class _Row:
    """A stream, and the block that it is in."""

    def __init__(self, streams: TokenStreams, number: int, done: int) -> None:
        self._streams = streams
        self._number, self._done = number, done
        self._tokens = streams.block(number)

    @property
    def place(self) -> tuple[int, int]:
        return self._number, self._done

    def read(self, count: int) -> tuple[Tokens, bool]:
        """The next ``count`` tokens and the one behind them, which is read again; whether a document starts here."""
        starts = self._starts_document()
        pieces, left = [], count
        while True:
            piece = self._tokens[self._done : self._done + left]
            pieces.append(piece)
            self._done, left = self._done + len(piece), left - len(piece)
            while self._done == len(self._tokens):
                self._number, self._done = (self._number + 1) % self._streams.blocks, 0
                self._tokens = self._streams.block(self._number)
            if not left:
                return np.concatenate([*pieces, self._tokens[self._done : self._done + 1]]), starts

    def _starts_document(self) -> bool:
        """A delimiter is always a token by itself, and behind the file's last byte there is one."""
        if self._done:
            return bool(self._tokens[self._done - 1] == self._streams.vocabulary.delimiter)
        edge = self._streams.edge(self._number)
        return edge == 0 or bool(self._streams.data[edge - 1] == DELIMITER)

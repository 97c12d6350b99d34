"""What a task is: a generator of exact examples, its alphabet, and what guessing would reach.

An example is a sequence of T tokens, a target at each, and a mask of the positions that count. A position that counts
is answered behind its token, from all tokens up to it. Rows of one length have equally many such positions.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from elman.errors import UsageError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

#: Vocabularies are multiples of it, which matrix products on GPUs need to be fast.
_MULTIPLE = 8
_LONGEST = 1 << 20


class Examples(NamedTuple):
    """Rows of a task.

    Attributes:
        tokens: (B, T) int64, below the task's number of symbols.
        targets: (B, T) int64, likewise; of no meaning where the mask is false.
        mask: (B, T) bool, the positions that count; at least one a row.
    """

    tokens: IntArray
    targets: IntArray
    mask: BoolArray


class Task(ABC):
    """A task. Its file's docstring draws an example, and says exactly how one is generated.

    Attributes:
        name: as on the command line.
        asks: what is to be answered, in a line.
        source: the paper.
        symbols: of the tokens 0, 1, ..., inputs first; those that only labels use come last.
        shortest: the least T.
        random_lengths: whether training shall draw lengths: where the positions that count do not make every prefix of
            an example one of its own.
    """

    name: ClassVar[str]
    asks: ClassVar[str]
    source: ClassVar[str]
    shortest: ClassVar[int] = 1
    random_lengths: ClassVar[bool] = False
    symbols: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """Tokens that a model needs: the symbols, rounded up to a multiple of 8."""
        return -(-len(self.symbols) // _MULTIPLE) * _MULTIPLE

    @abstractmethod
    def chance(self, length: int) -> float:
        """Part of the positions that the best constant guess gets right, in examples of ``length``."""

    @abstractmethod
    def generate(self, generator: np.random.Generator, batch: int, length: int) -> Examples:
        """``batch`` examples of ``length``, which is long enough; all that is random is drawn from ``generator``."""

    def examples(self, generator: np.random.Generator, batch: int, length: int, option: str = "length") -> Examples:
        """``batch`` examples of T = ``length``, drawn from ``generator``.

        Raises:
            UsageError: ``length``, which ``option`` gave, is too short for the task, or beyond all measure.
        """
        self.check_length(length, option)
        if batch < 1:
            raise UsageError(f"batch {batch} is out of range: give a number of at least 1")
        return self.generate(generator, batch, length)

    def check_length(self, length: int, option: str = "length") -> None:
        """An example may have ``length`` tokens.

        Raises:
            UsageError: it may not; ``option`` is named in the message.
        """
        if not self.shortest <= length <= _LONGEST:
            raise UsageError(
                f"{option} {length} is out of range for task {self.name}: give a number from {self.shortest} to "
                f"{_LONGEST}"
            )

    @property
    def fingerprint(self) -> str:
        """By which it is seen that the generator is the same: of a few examples."""
        length = max(self.shortest, 24)
        rows = self.generate(np.random.Generator(np.random.Philox(key=0)), 4, length)
        known = [rows.tokens, np.where(rows.mask, rows.targets, -1)]
        return hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in known)).hexdigest()

    def draw(self, examples: Examples, row: int = 0) -> str:
        """A row as two lines: the input, and below it what is to be answered, a dot where nothing is."""
        given = [self.symbols[token] for token in examples.tokens[row]]
        pairs = zip(examples.targets[row], examples.mask[row], strict=True)
        asked = [self.symbols[target] if counts else "." for target, counts in pairs]
        widths = [max(len(a), len(b)) for a, b in zip(given, asked, strict=True)]
        lines = (
            " ".join(word.ljust(width) for word, width in zip(words, widths, strict=True)) for words in (given, asked)
        )
        return "\n".join(f"{head:8}{line}".rstrip() for head, line in zip(("input", "label"), lines, strict=True))


def unmasked(tokens: IntArray) -> tuple[IntArray, BoolArray]:
    """Targets and a mask for tokens (B, T), of which none counts yet."""
    return np.zeros_like(tokens), np.zeros(tokens.shape, dtype=np.bool_)


def letters(count: int) -> tuple[str, ...]:
    """``a``, ``b``, ...: names of so many symbols, up to 26."""
    return tuple("abcdefghijklmnopqrstuvwxyz"[:count])

"""Dyck-1 and Dyck-2 of depth at most 8: how deep is it here, and which bracket is open?

    input   [  [  ]  [  (  )  ]  ] (  )
    label   [1 [2 [1 [2 (3 [2 [1 0 (1 0        k = 2

A prefix of a well-nested word: at depth 0 a bracket opens, at depth 8 the last one closes, in between either with
probability 1/2. What opens is uniform over the k = 1 or 2 kinds. The label is the depth and the kind of the bracket
that is to close next, or 0 where none is open; so at k = 1 the depth must be kept, and at k = 2 the whole stack,
whose brackets show again as others close. All positions count. Guessing the most frequent label gets 0.209 at k = 1
and 0.105 at k = 2 for T = 40, worked out exactly from the walk of the depth, and less for longer ones.

Sources: J. Hewitt et al., "RNNs can generate bounded hierarchical languages with optimal memory" (2020); S. Yao et
al., "Self-Attention Networks Can Process Bounded Hierarchical Languages" (2021).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from elman.evaluation.tasks.base import Examples, Task

_DEPTH = 8
_PAIRS = ("()", "[]")


class _Dyck(Task):
    """See the top of this file. Symbols: opening brackets, closing ones; labels: 0, (1 to (8, and [1 to [8."""

    kinds: ClassVar[int]
    source = "Hewitt et al. (2020)"

    def __init__(self) -> None:
        pairs = _PAIRS[: self.kinds]
        labels = (f"{pair[0]}{depth}" for depth in range(1, _DEPTH + 1) for pair in pairs)
        self.symbols = (*(pair[0] for pair in pairs), *(pair[1] for pair in pairs), "0", *labels)

    def generate(self, generator: np.random.Generator, batch: int, length: int) -> Examples:
        rows, first_label = np.arange(batch), 2 * self.kinds
        tokens, labels = np.empty((2, batch, length), dtype=np.int64)
        wants_open = generator.integers(0, 2, size=(batch, length)).astype(np.bool_)
        kinds = generator.integers(0, self.kinds, size=(batch, length))
        # stack[:, d] is the kind that was opened at depth d; the bottom, which never closes, is one too.
        stack, depth = np.zeros((batch, _DEPTH + 1), dtype=np.int64), np.zeros(batch, dtype=np.int64)
        for t in range(length):
            opens = (depth == 0) | ((depth < _DEPTH) & wants_open[:, t])
            tokens[:, t] = np.where(opens, kinds[:, t], self.kinds + stack[rows, depth])
            depth = np.where(opens, depth + 1, depth - 1)
            stack[rows[opens], depth[opens]] = kinds[opens, t]
            inside = 1 + (depth - 1) * self.kinds + stack[rows, depth]
            labels[:, t] = first_label + np.where(depth == 0, 0, inside)
        return Examples(tokens, labels, np.ones(tokens.shape, dtype=np.bool_))

    def chance(self, length: int) -> float:
        step = np.zeros((_DEPTH + 1, _DEPTH + 1))
        step[0, 1] = step[_DEPTH, _DEPTH - 1] = 1
        for depth in range(1, _DEPTH):
            step[depth, [depth - 1, depth + 1]] = 1 / 2
        distribution, visits = np.eye(_DEPTH + 1)[0], np.zeros(_DEPTH + 1)
        for _ in range(length):
            distribution = distribution @ step
            visits += distribution
        return float(max(visits[0], visits[1:].max() / self.kinds) / length)


class Dyck1(_Dyck):
    """One kind of bracket."""

    name, kinds = "dyck_1", 1
    asks = "how many brackets are open, of at most 8?"


class Dyck2(_Dyck):
    """Two kinds of brackets."""

    name, kinds = "dyck_2", 2
    asks = "how many brackets of two kinds are open, and of which kind is the last?"

"""Induction heads: what came behind the mark when it was there before?

    input   e b | k a p b |        T = 8
    label   . . . . . . . k

Letters are independent and uniform over a to p. The mark | stands at the end, and at a place drawn uniformly from
those that leave a letter behind it; that letter is to be told at the end, the one position that counts. Guessing gets
1/16.

Sources: C. Olsson et al., "In-context Learning and Induction Heads" (2022); A. Gu and T. Dao, "Mamba: Linear-Time
Sequence Modeling with Selective State Spaces" (2023), whose variant with one mark this is.
"""

from __future__ import annotations

import numpy as np

from elman.evaluation.tasks.base import Examples, Task, letters, unmasked

_LETTERS = 16
_MARK = _LETTERS


class InductionHeads(Task):
    """See the top of this file. Symbols: a to p, |."""

    name = "induction_heads"
    asks = "which letter came behind the mark before?"
    source = "Gu and Dao (2023)"
    shortest = 3
    random_lengths = True
    symbols = (*letters(_LETTERS), "|")

    def generate(self, generator: np.random.Generator, batch: int, length: int) -> Examples:
        tokens = generator.integers(0, _LETTERS, size=(batch, length))
        rows, places = np.arange(batch), generator.integers(0, length - 2, size=batch)
        tokens[rows, places] = tokens[:, -1] = _MARK
        targets, mask = unmasked(tokens)
        targets[:, -1] = tokens[rows, places + 1]
        mask[:, -1] = True
        return Examples(tokens, targets, mask)

    def chance(self, length: int) -> float:
        return 1 / _LETTERS

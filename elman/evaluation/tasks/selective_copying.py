"""Selective copying: say again what was said, without the noise in between.

    input   . c . . a . h | - - -        T = 11
    label   . . . . . . . . c a h

n = min(8, ⌊(T - 1) / 3⌋) letters, independent and uniform over a to h, stand in their order at places drawn uniformly
without replacement from the first T - 1 - n; noise stands at the others. Then come the mark | and n blanks, at which
the letters are to be told. The n positions behind the mark count. Guessing gets 1/8. From T = 25 on, n stays 8 and
only the noise grows.

Sources: L. Jing et al., "Gated Orthogonal Recurrent Units: On Learning to Forget" (2019); A. Gu and T. Dao, "Mamba:
Linear-Time Sequence Modeling with Selective State Spaces" (2023).
"""

from __future__ import annotations

import numpy as np

from elman.evaluation.tasks.base import Examples, Task, letters, unmasked

_LETTERS, _MOST = 8, 8
_NOISE, _MARK, _BLANK = _LETTERS, _LETTERS + 1, _LETTERS + 2


class SelectiveCopying(Task):
    """See the top of this file. Symbols: a to h, the noise, |, -."""

    name = "selective_copying"
    asks = "which letters came before the mark, among noise?"
    source = "Gu and Dao (2023)"
    shortest = 4
    random_lengths = True
    symbols = (*letters(_LETTERS), ".", "|", "-")

    def generate(self, generator: np.random.Generator, batch: int, length: int) -> Examples:
        n = min(_MOST, (length - 1) // 3)
        mark = length - 1 - n
        tokens = np.full((batch, length), _NOISE)
        places = np.sort(generator.random((batch, mark)).argsort(axis=1)[:, :n], axis=1)
        said = generator.integers(0, _LETTERS, size=(batch, n))
        np.put_along_axis(tokens, places, said, axis=1)
        tokens[:, mark] = _MARK
        tokens[:, mark + 1 :] = _BLANK
        targets, mask = unmasked(tokens)
        targets[:, mark + 1 :] = said
        mask[:, mark + 1 :] = True
        return Examples(tokens, targets, mask)

    def chance(self, length: int) -> float:
        return 1 / _LETTERS

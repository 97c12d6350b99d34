"""Copying: say again what was said.

    input   c a h e | - - - -        T = 9
    label   . . . . . c a h e

n = ⌊(T - 1) / 2⌋ letters, independent and uniform over a to h, then the mark |, then n blanks, at which the letters
are to be told in their order. Blanks fill what is left of T. The n positions behind the mark count. Guessing gets
1/8. What must be kept, 3 n bits, grows with T: a state of fixed size fails from some length on, however it was
trained.

Sources: S. Hochreiter and J. Schmidhuber, "Long Short-Term Memory" (1997); M. Arjovsky, A. Shah and Y. Bengio,
"Unitary Evolution Recurrent Neural Networks" (2016), with a delay before the mark.
"""

from __future__ import annotations

import numpy as np

from elman.evaluation.tasks.base import Examples, Task, letters, unmasked

_LETTERS = 8
_MARK, _BLANK = _LETTERS, _LETTERS + 1


class Copying(Task):
    """See the top of this file. Symbols: a to h, |, -."""

    name = "copying"
    asks = "which letters came before the mark, in their order?"
    source = "Arjovsky et al. (2016)"
    shortest = 3
    random_lengths = True
    symbols = (*letters(_LETTERS), "|", "-")

    def generate(self, generator: np.random.Generator, batch: int, length: int) -> Examples:
        n = (length - 1) // 2
        tokens = np.full((batch, length), _BLANK)
        tokens[:, :n] = generator.integers(0, _LETTERS, size=(batch, n))
        tokens[:, n] = _MARK
        targets, mask = unmasked(tokens)
        targets[:, n + 1 : 2 * n + 1] = tokens[:, :n]
        mask[:, n + 1 : 2 * n + 1] = True
        return Examples(tokens, targets, mask)

    def chance(self, length: int) -> float:
        return 1 / _LETTERS

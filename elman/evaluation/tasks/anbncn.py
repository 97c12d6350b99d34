"""aⁿ bⁿ cⁿ: what comes next, where only counting tells.

    input   a a a b b b c c c $ $        n = 3
    label   . . . . b c . c $ . .

n is uniform over the upper half of what fits: ⌊T/6⌋ + 1, but at least 2, to ⌊T/3⌋. Behind the word comes the end mark
$, to the last position. What follows the last b and the last c counts, and what follows the b and the c before these:
no one else can tell when a run ends than who has counted. Of these four positions, always guessing c gets 1/2, and so
does always guessing that a run goes on. The language is context-sensitive, and not context-free.

Source: F. Gers and J. Schmidhuber, "LSTM Recurrent Networks Learn Simple Context-Free and Context-Sensitive
Languages" (2001), where every position counts.
"""

from __future__ import annotations

import numpy as np

from elman.evaluation.tasks.base import Examples, Task, unmasked


class AnBnCn(Task):
    """See the top of this file. Symbols: a, b, c, $."""

    name = "anbncn"
    asks = "in aⁿ bⁿ cⁿ, does the run end here?"
    source = "Gers and Schmidhuber (2001)"
    shortest = 6
    random_lengths = True
    symbols = ("a", "b", "c", "$")

    def generate(self, generator: np.random.Generator, batch: int, length: int) -> Examples:
        n = generator.integers(max(2, length // 6 + 1), length // 3, size=(batch, 1), endpoint=True)
        tokens = np.minimum(np.arange(length) // n, 3)
        targets, mask = unmasked(tokens)
        rows = np.arange(batch)[:, None]
        places = n * np.array([2, 2, 3, 3]) - np.array([2, 1, 2, 1])
        targets[rows, places] = np.array([1, 2, 2, 3])
        mask[rows, places] = True
        return Examples(tokens, targets, mask)

    def chance(self, length: int) -> float:
        return 1 / 2

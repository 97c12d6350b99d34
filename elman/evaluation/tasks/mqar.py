"""Multi-query associative recall: which value belongs to this key?

    input   k6 v6 k13 v15 k31 v2 k31 k13 - k6 - -
    label   .  .  .   .   .   .  v2  v15 . v6 . .

K = min(8, ⌊T / 4⌋) keys, drawn without replacement from 32, each followed by its value, independent and uniform over
32. Then every key comes again, once, and its value is to be told there. The places of these queries are drawn without
replacement from the T - 2 K that are left, the i-th of them, from 1 on, in proportion to i^(a - 1) with a = 0.01:
most come soon, some late. Blanks stand at the others. The K queries count. Guessing gets 1/32.

Source: S. Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2024).
"""

from __future__ import annotations

import numpy as np

from elman.evaluation.tasks.base import Examples, Task, unmasked

_KEYS, _VALUES, _MOST, _POWER = 32, 32, 8, 0.01
_BLANK = _KEYS + _VALUES


class MQAR(Task):
    """See the top of this file. Symbols: k0 to k31, v0 to v31, -."""

    name = "mqar"
    asks = "which value came with this key?"
    source = "Arora et al. (2024)"
    shortest = 4
    random_lengths = True
    symbols = (*(f"k{i}" for i in range(_KEYS)), *(f"v{i}" for i in range(_VALUES)), "-")

    def generate(self, generator: np.random.Generator, batch: int, length: int) -> Examples:
        pairs = min(_MOST, length // 4)
        keys = generator.random((batch, _KEYS)).argsort(axis=1)[:, :pairs]
        values = _KEYS + generator.integers(0, _VALUES, size=(batch, pairs))
        tokens = np.full((batch, length), _BLANK)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        # The largest of logarithms of weights plus Gumbel noise are a draw without replacement (Vieira, 2014).
        slots = length - 2 * pairs
        scores = (_POWER - 1) * np.log(np.arange(1, slots + 1)) + generator.gumbel(size=(batch, slots))
        places = 2 * pairs + scores.argsort(axis=1)[:, -pairs:]
        np.put_along_axis(tokens, places, keys, axis=1)
        targets, mask = unmasked(tokens)
        np.put_along_axis(targets, places, values, axis=1)
        np.put_along_axis(mask, places, True, axis=1)
        return Examples(tokens, targets, mask)

    def chance(self, length: int) -> float:
        return 1 / _VALUES

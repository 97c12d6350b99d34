"""ListOps: the value of a nested expression.

    input   [MAX 2 9 [MIN 4 7 ] 0 ] -        T = 10
    label   .    . . .    . . . . 9 .

The grammar is that of the Long Range Arena: an operator has 2 to 10 arguments, uniformly; an argument is an operator
with probability 1/4, else a digit, uniform over 0 to 9; operators are uniform over MIN, MAX, MED (the median, rounded
down) and SM (the sum modulo 10); the depth is at most 10, and the outermost is an operator. So that an expression
fits into T, an operator is given no more arguments than leave room to close all that is open, and a digit stands
where not even two fit; expressions shorter than ⌈T / 2⌉ are drawn anew. Blanks fill the rest. The value, a digit, is
to be told at the last bracket, the one position that counts. Guessing the most frequent value gets about 0.16: more
than 1/10, for MIN and MAX of many digits are mostly small and large. That number is an estimate, from 2¹³ examples of
at most 40 tokens; those of longer ones differ by no more than its error.

Sources: N. Nangia and S. Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning" (2018); Y. Tay et al.,
"Long Range Arena: A Benchmark for Efficient Transformers" (2021).
"""

from __future__ import annotations

import functools

import numpy as np

from elman.evaluation.tasks.base import Examples, IntArray, Task, unmasked

_OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
_MIN, _MAX, _MED, _SUM = range(len(_OPERATORS))
_LEAST, _MOST, _DEPTH = 2, 10, 10
_NESTED = 1 / 4
_FIRST_OPERATOR = 10
_CLOSE, _BLANK = _FIRST_OPERATOR + len(_OPERATORS), _FIRST_OPERATOR + len(_OPERATORS) + 1
#: Examples drawn for each that is wanted: about as many as are too short.
_SPARE = 3
#: Chance is estimated from so many examples, and of at most this length: longer ones take long, and change little.
_ESTIMATED_FROM, _ESTIMATED_AT = 1 << 13, 40


class ListOps(Task):
    """See the top of this file. Symbols: 0 to 9, [MIN, [MAX, [MED, [SM, ], -."""

    name = "listops"
    asks = "what is the value of the expression?"
    source = "Tay et al. (2021)"
    shortest = 4
    random_lengths = True
    symbols = (*map(str, range(10)), *_OPERATORS, "]", "-")

    def generate(self, generator: np.random.Generator, batch: int, length: int) -> Examples:
        parts: list[Examples] = []
        while sum(len(part.tokens) for part in parts) < batch:
            drawn = _draw(generator, _SPARE * batch, length)
            enough = (drawn.tokens != _BLANK).sum(axis=1) >= (length + 1) // 2
            parts.append(Examples(*(whole[enough] for whole in drawn)))
        return Examples(*(np.concatenate(pieces)[:batch] for pieces in zip(*parts, strict=True)))

    def chance(self, length: int) -> float:
        return _estimated_chance(self, min(length, _ESTIMATED_AT))


@functools.cache
def _estimated_chance(task: ListOps, length: int) -> float:
    rows = task.generate(np.random.Generator(np.random.Philox(key=0)), _ESTIMATED_FROM, length)
    return float(np.bincount(rows.targets[rows.mask]).max() / _ESTIMATED_FROM)


def _draw(generator: np.random.Generator, batch: int, length: int) -> Examples:
    """Expressions of at most ``length`` tokens, however short, written from the left, all rows at once."""
    rows = np.arange(batch)
    tokens = np.full((batch, length), _BLANK)
    targets, mask = unmasked(tokens)
    # By depth, of the operator that is open there: which, arguments still to come, and the values of those that came.
    # At depth 0 the whole expression is the one argument.
    operator, to_come, came = np.zeros((3, batch, _DEPTH + 1), dtype=np.int64)
    values = np.zeros((batch, _DEPTH + 1, _MOST), dtype=np.int64)
    to_come[:, 0] = 1
    depth, owed = np.zeros(batch, dtype=np.int64), np.ones(batch, dtype=np.int64)
    for t in range(length):
        nested, share = generator.random((2, batch))
        digits, operators = generator.integers(0, 10, size=batch), generator.integers(0, len(_OPERATORS), size=batch)
        done = owed == 0
        closes = ~done & (to_come[rows, depth] == 0)
        # An operator of k arguments owes k + 1 tokens more than the digit in its place.
        most = np.minimum(_MOST, length - t - owed - 1)
        wants = (nested < _NESTED) | (t == 0)
        opens = ~done & ~closes & wants & (depth < _DEPTH) & (most >= _LEAST)
        tells = ~done & ~closes & ~opens
        tokens[closes, t] = _CLOSE
        tokens[tells, t] = digits[tells]
        tokens[opens, t] = _FIRST_OPERATOR + operators[opens]
        owed -= ~done
        value = digits
        if closes.any():
            value = digits.copy()
            at = rows[closes], depth[closes]
            value[closes] = _evaluate(operator[at], values[at], came[at])
            depth -= closes
        gives = rows[closes | tells]
        at = gives, depth[gives]
        inside = depth[gives] > 0
        values[at[0][inside], at[1][inside], came[at][inside]] = value[gives][inside]
        came[at] += 1
        to_come[rows[tells], depth[tells]] -= 1
        ends = closes & (depth == 0)
        targets[ends, t], mask[ends, t] = value[ends], True
        to_come[rows[opens], depth[opens]] -= 1
        depth += opens
        at = rows[opens], depth[opens]
        count = _LEAST + (share[opens] * (most[opens] - _LEAST + 1)).astype(np.int64)
        operator[at], to_come[at], came[at] = operators[opens], count, 0
        owed[opens] += count + 1
    return Examples(tokens, targets, mask)


def _evaluate(operator: IntArray, values: IntArray, count: IntArray) -> IntArray:
    """Of operator (N,) and values (N, 10) of which the first ``count`` (N,) are there: (N,)."""
    there = np.arange(values.shape[1]) < count[:, None]
    ordered = np.sort(np.where(there, values, 10), axis=1)
    rows = np.arange(len(operator))
    middle = (ordered[rows, (count - 1) // 2] + ordered[rows, count // 2]) // 2
    total = np.where(there, values, 0).sum(axis=1) % 10
    return np.choose(operator, [ordered[:, 0], ordered[rows, count - 1], middle, total])

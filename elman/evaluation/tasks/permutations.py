"""The word problem of the symmetric groups S3 and S5: what do the permutations so far make together?

    input   102  120  021  210          S3
    label   =102 =210 =120 =102

A permutation g is written as g(0) g(1) ... Permutations are independent and uniform over all n! of them; the label of
step t is g_t ∘ ... ∘ g_1, g_1 being the first to act. Guessing gets 1/n!: 1/6 or 1/120. S5 is not solvable, so that
its word problem is complete for NC¹ (Barrington, 1989): were a model of fixed depth that is a constant-depth
threshold circuit, as Transformers and linear recurrences with diagonal transitions are, to solve it, TC⁰ would be
NC¹.

Source: W. Merrill, J. Petty and A. Sabharwal, "The Illusion of State in State-Space Models" (2024).
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np

from elman.evaluation.tasks.state_tracking import StateTracking


class _Permutations(StateTracking):
    """See the top of this file. Symbols: the n! permutations in lexicographic order; labels: the same behind =."""

    points: ClassVar[int]
    source = "Merrill et al. (2024)"

    def __init__(self) -> None:
        group = list(itertools.permutations(range(self.points)))
        place = {permutation: i for i, permutation in enumerate(group)}
        products = [[place[tuple(g[i] for i in before)] for g in group] for before in group]
        names = tuple("".join(map(str, permutation)) for permutation in group)
        super().__init__(np.array(products), names, tuple(f"={name}" for name in names))


class S3(_Permutations):
    """Of three points."""

    name, points = "s3", 3
    asks = "what do the permutations of 3 points so far make together?"


class S5(_Permutations):
    """Of five points."""

    name, points = "s5", 5
    asks = "what do the permutations of 5 points so far make together?"

"""Parity: whether the ones so far are even or odd in number.

    input   1    0    1    1    0    1
    label   odd  odd  even odd  odd  even

Bits are independent, each 0 or 1 with probability 1/2; the label of step t is the sum of bits 1 to t, modulo 2.
Guessing gets 1/2. One bit of state suffices. A linear recurrence whose gates are positive cannot hold it for all
lengths (Sarrof, Veitsman and Hahn, 2024), nor does soft attention of fixed depth robustly (Hahn, 2020).

Sources: M. Minsky and S. Papert, "Perceptrons" (1969); M. Hahn, "Theoretical Limitations of Self-Attention in Neural
Sequence Models" (2020).
"""

from __future__ import annotations

import numpy as np

from elman.evaluation.tasks.state_tracking import StateTracking


class Parity(StateTracking):
    """See the top of this file. Symbols: 0, 1; labels: even, odd."""

    name = "parity"
    asks = "are the ones so far even or odd in number?"
    source = "Hahn (2020)"

    def __init__(self) -> None:
        super().__init__(np.array([[0, 1], [1, 0]]), ("0", "1"), ("even", "odd"))

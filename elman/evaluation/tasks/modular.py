"""Counting modulo m = 3, 5 or 7: the sum of the digits so far.

    input   2  0  2  1  1  2        m = 3
    label   =2 =2 =1 =2 =0 =2

Digits are independent and uniform over 0 to m - 1; the label of step t is the sum of digits 1 to t, modulo m.
Guessing gets 1/m. The group is the cyclic one, which is commutative.

Source: G. Deletang et al., "Neural Networks and the Chomsky Hierarchy" (2023), whose simplest arithmetic this is.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from elman.evaluation.tasks.state_tracking import StateTracking


class _Modular(StateTracking):
    """See the top of this file. Symbols: 0 to m - 1; labels: =0 to =(m - 1)."""

    modulus: ClassVar[int]
    source = "Deletang et al. (2023)"

    def __init__(self) -> None:
        numbers = np.arange(self.modulus)
        digits = tuple(map(str, range(self.modulus)))
        super().__init__((numbers[:, None] + numbers) % self.modulus, digits, tuple(f"={digit}" for digit in digits))


class Mod3(_Modular):
    """Modulo 3."""

    name, modulus = "mod_3", 3
    asks = "what is the sum of the digits so far, modulo 3?"


class Mod5(_Modular):
    """Modulo 5."""

    name, modulus = "mod_5", 5
    asks = "what is the sum of the digits so far, modulo 5?"


class Mod7(_Modular):
    """Modulo 7."""

    name, modulus = "mod_7", 7
    asks = "what is the sum of the digits so far, modulo 7?"

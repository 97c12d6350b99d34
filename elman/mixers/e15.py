"""E15: E1 with the softsign, v / (1 + |v|), in place of tanh: cheaper, and slower to saturate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elman.mixers.e1 import E1Config


@dataclass(frozen=True)
class E15Config(E1Config):
    """As E1: 3e + 2e² weights in units of D² (5 at e = 1), 2e + 4e² with the hx gate."""

    name: ClassVar[str] = "e15"
    equation: ClassVar[str] = "E1 with v / (1 + |v|) in place of tanh"
    cell: ClassVar[str] = "softsign"

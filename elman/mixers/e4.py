"""E4, the low-rank Elman network: E1 with W_h = U V, which pays for more units than a dense W_h could have.

    h_t = tanh(U V h_{t-1} + W_x u_t + b)     U (d, r), V (r, d), d = e D; the rest as E1

With r absent, max(16, D/(2e)): U V has as many weights at any expansion e as a dense W_h at e = 1. The bound on the
largest singular value of the product U V is ``--constraint spectral_norm``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elman.mixers.e1 import E1Config
from elman.mixers.recurrent_weight import Structure


@dataclass(frozen=True)
class E4Config(E1Config):
    """Low-rank Elman: 3e + e² + 2 e r/D weights in units of D² (11 at e = 2, r = D/4)."""

    name: ClassVar[str] = "e4"
    equation: ClassVar[str] = "e1 with W_h = U V, r = D/(2e)"

    structure: Structure = "low_rank"
    expansion: float = 2.0

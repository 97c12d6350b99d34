"""Rungs of the ladder whose state is (log |h|, sign h), mixed in log space; products see h itself.

    log_1 … log_5    ladder_1 … ladder_5
    log_0            ladder_6, the polynomial one, with c = sign(v) σ(α log |v|), whose logarithm −softplus(−α log |v|)
                     needs no clamp: c is as |v|^α for small v, and below 1 for all

The δ-mix h = (1 − δ) h + δ c is a signed log-sum-exp. What differs from the rung of the same number is how the state is
rounded: relative to its logarithm, which small states do not fall below. It is float32 under autocast, because bf16
would round a logarithm of −20, and so h, by 6%; what the products see is h, as everywhere. The state is h, for the next
product, and the logarithm with the sign in one number (``elman.ops.log_space.join``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elman.mixers.base import MixerConfig
from elman.mixers.ladder import (
    Ladder1Config,
    Ladder2Config,
    Ladder3Config,
    Ladder4Config,
    Ladder5Config,
    Ladder6Config,
)


class _LogSpace(MixerConfig):
    """What their configs share. Not a rung: its defaults would come before those of the rung it joins."""

    def state_size(self, dim: int, seq_len: int) -> int:
        assert isinstance(self, Ladder1Config)
        return 2 * self.inner_size(dim)


@dataclass(frozen=True)
class Log0Config(_LogSpace, Ladder6Config):
    """Weights as ladder_6."""

    name: ClassVar[str] = "log_0"
    equation: ClassVar[str] = "ladder_6 by (log |h|, sign h), with sign(v) |v|^α / (1 + |v|^α) for the candidate"
    cell: ClassVar[str] = "log_polynomial"


@dataclass(frozen=True)
class Log1Config(_LogSpace, Ladder1Config):
    """Weights as ladder_1."""

    name: ClassVar[str] = "log_1"
    equation: ClassVar[str] = "ladder_1 by (log |h|, sign h)"
    cell: ClassVar[str] = "log_delta"


@dataclass(frozen=True)
class Log2Config(_LogSpace, Ladder2Config):
    """Weights as ladder_2."""

    name: ClassVar[str] = "log_2"
    equation: ClassVar[str] = "ladder_2 by (log |h|, sign h)"
    cell: ClassVar[str] = "log_delta"


@dataclass(frozen=True)
class Log3Config(_LogSpace, Ladder3Config):
    """Weights as ladder_3."""

    name: ClassVar[str] = "log_3"
    equation: ClassVar[str] = "ladder_3 by (log |h|, sign h)"
    cell: ClassVar[str] = "log_delta"


@dataclass(frozen=True)
class Log4Config(_LogSpace, Ladder4Config):
    """Weights as ladder_4."""

    name: ClassVar[str] = "log_4"
    equation: ClassVar[str] = "ladder_4 by (log |h|, sign h)"
    cell: ClassVar[str] = "log_delta"


@dataclass(frozen=True)
class Log5Config(_LogSpace, Ladder5Config):
    """Weights as ladder_5."""

    name: ClassVar[str] = "log_5"
    equation: ClassVar[str] = "ladder_5 by (log |h|, sign h)"
    cell: ClassVar[str] = "log_triple_r"

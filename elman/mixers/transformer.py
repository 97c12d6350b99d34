"""The Llama-style Transformer layer: causal attention with rotary positions, then a SwiGLU network.

    a = Attention(norm(x));  x = x + a
    m = W_down (silu(W_gate n) * W_up n), n = norm(x);  x = x + m

One layer of the model is both halves, each between a norm and a sum of the shell. Sources: Vaswani et al. (2017),
Su et al. (2021) for the rotary positions, Shazeer (2020) for SwiGLU, Touvron et al. (2023) for the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers.base import Mixer, MixerConfig, State, round_width, split_heads
from elman.ops import note_backend
from elman.ops.registration import register_opaque
from elman.options import check_at_least

_ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class TransformerConfig(MixerConfig):
    """Attention and SwiGLU: 4 + 3 m weights in units of D² (12 at m = 8/3)."""

    name: ClassVar[str] = "transformer"
    equation: ClassVar[str] = "x += softmax(q kᵀ) v; x += W_d (silu(W_g x) * W_u x)"

    head_dim: int = 64
    """Width of a head, about: the heads share the model width evenly."""
    mlp: float = 8 / 3
    """Hidden width of the SwiGLU network as a multiple of the model width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, head_dim=8)
        if not 0 < self.mlp <= 64:
            raise UsageError(f"--mlp {self.mlp} is out of range: give a number above 0 and up to 64")

    def heads(self, dim: int) -> tuple[int, int]:
        """How many heads, and how wide each."""
        return split_heads(dim, self.head_dim)

    def mlp_size(self, dim: int) -> int:
        """Hidden width of the SwiGLU network."""
        return round_width(self.mlp * dim)

    def build(self, dim: int) -> tuple[Mixer, ...]:
        return Attention(dim, *self.heads(dim)), SwiGLU(dim, self.mlp_size(dim))

    def num_params(self, dim: int) -> int:
        count, width = self.heads(dim)
        return 4 * dim * count * width + 3 * dim * self.mlp_size(dim) + dim

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        """As in the base; attention as over the whole context for every token, which is how it is commonly counted."""
        count, width = self.heads(dim)
        return 2 * (4 * dim * count * width + 3 * dim * self.mlp_size(dim)) + 4 * seq_len * count * width

    def state_size(self, dim: int, seq_len: int) -> int:
        """Keys and values of ``seq_len`` tokens, and where the document began."""
        count, width = self.heads(dim)
        return 2 * seq_len * count * width + 1


class Attention(Mixer):
    """Causal self-attention within a document.

    The state is the keys, rotated, and the values (B, heads, S, width) of the S tokens so far, and the index (B,) of
    the first one that the row still sees: the first of its document.
    """

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(dim, 3 * heads * width, bias=False)
        self.out_proj = nn.Linear(heads * width, dim, bias=False)

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        note_backend("sdpa")
        steps, batch, _ = x.shape
        qk, v = self.qkv_proj(x).view(steps, batch, 3, self.heads, -1).permute(2, 1, 3, 0, 4).split((2, 1))
        v = v.squeeze(0)
        seen = 0 if state is None else state[0].shape[2]
        q, k = _rotate(qk, seen)
        if state is None and reset is None:
            start = torch.zeros(batch, dtype=torch.long, device=x.device)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            start = torch.zeros(batch, dtype=torch.long, device=x.device) if state is None else state[2]
            k = k if state is None else torch.cat((state[0].to(k.dtype), k), dim=2)
            v = v if state is None else torch.cat((state[1].to(v.dtype), v), dim=2)
            keys = torch.arange(seen + steps, device=x.device)
            starts = start.expand(steps, batch)
            if reset is not None:
                starts = torch.where(reset, keys[seen:, None], starts).cummax(0).values
            start = starts[-1]
            sees = (keys <= keys[seen:, None]) & (keys >= starts.t().unsqueeze(-1))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees.unsqueeze(1))
        return self.out_proj(y.permute(2, 0, 1, 3).flatten(2)), (k, v, start)


class SwiGLU(Mixer):
    """The position-wise half of the layer; its state is empty."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, size, bias=False)
        self.up_proj = nn.Linear(dim, size, bias=False)
        self.down_proj = nn.Linear(size, dim, bias=False)

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), ()


def _rotate(x: Tensor, first: int) -> Tensor:
    """Turn the halves of x (..., T, width) against each other by angles that grow with the position, ``first`` on."""
    steps, width = x.shape[-2:]
    dtype = x.dtype if x.dtype.itemsize >= 4 else torch.float32
    cos, sin = (table.to(dtype) for table in torch.ops.elman.rotary_tables(first, steps, width, x.device))
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def _rotary_tables(first: int, steps: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, width / 2) of the angles, in float64."""
    # A float32 position of a million times a frequency is off by hundredths.
    frequencies = _ROTARY_BASE ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(first, first + steps, device=device, dtype=torch.float64), frequencies)
    return angles.cos(), angles.sin()


def _like_rotary_tables(first: int, steps: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    table = torch.empty(steps, (width + 1) // 2, device=device, dtype=torch.float64)
    return table, torch.empty_like(table)


# An op, lest a compiler fuses it into what it is multiplied by, and takes sines in float64 once a number of q and k.
register_opaque("rotary_tables", _rotary_tables, _like_rotary_tables)

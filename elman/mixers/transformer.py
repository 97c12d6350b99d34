"""The Llama-style Transformer layer: causal attention with rotary positions, then a SwiGLU network.

    a = Attention(norm(x));  x = x + a
    m = W_down (silu(W_gate n) * W_up n), n = norm(x);  x = x + m

One layer of the model is both halves, each between a norm and a sum of the shell. Sources: Vaswani et al. (2017),
Su et al. (2021) for the rotary positions, Shazeer (2020) for SwiGLU, Touvron et al. (2023) for the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.mixers.base import Mixer, MixerConfig, State, round_width, split_heads
from elman.mixers.mlp import HIDDEN, SwiGLU, check_hidden
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
    mlp: float = HIDDEN
    """Hidden width of the SwiGLU network as a multiple of the model width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, head_dim=8)
        check_hidden("--mlp", self.mlp)

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


class KeyValueCache(NamedTuple):
    """The state of attention with room for C tokens, which is written to in place.

    Attributes:
        keys: (B, heads, C, width), rotated; zeros where there are none yet.
        values: likewise.
        start: (B,), the index of the first token that the row still sees.
        length: (), tokens so far.
        turns: (C, 2, width / 2), cosines and sines of the places' angles: worked out once, not by every step.
        places: (C,), 0 to C - 1.
    """

    keys: Tensor
    values: Tensor
    start: Tensor
    length: Tensor
    turns: Tensor
    places: Tensor

    @staticmethod
    def of(keys: Tensor, values: Tensor, start: Tensor, length: int) -> KeyValueCache:
        """One whose first ``length`` keys and values are known."""
        places = torch.arange(keys.shape[2], device=keys.device)
        turns = torch.stack(_rotary_angles(places, keys.shape[-1]), dim=1).to(_at_least_float32(keys.dtype))
        return KeyValueCache(keys, values, start, torch.tensor(length, device=keys.device), turns, places)


class Attention(Mixer):
    """Causal self-attention within a document.

    The state is the keys, rotated, and the values (B, heads, S, width) of the S tokens so far, and the index (B,) of
    the first one that the row still sees: the first of its document. It grows with S; reserved, it is a
    ``KeyValueCache``, whose every step reads all of its room.
    """

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(dim, 3 * heads * width, bias=False)
        self.out_proj = nn.Linear(heads * width, dim, bias=False)

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        note_backend("cache" if isinstance(state, KeyValueCache) else "sdpa")
        steps, batch, _ = x.shape
        qk, v = self.qkv_proj(x).view(steps, batch, 3, self.heads, -1).permute(2, 1, 3, 0, 4).split((2, 1))
        v = v.squeeze(0)
        if isinstance(state, KeyValueCache):
            y, state = _attend_in_place(qk, v, state, reset)
            return self.out_proj(y.permute(2, 0, 1, 3).flatten(2)), state
        seen = 0 if state is None else state[0].shape[2]
        q, k = _rotate(qk, *torch.ops.elman.rotary_tables(seen, steps, qk.shape[-1], x.device))
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

    def reserve(self, state: State, steps: int) -> State:
        length = int(state.length) if isinstance(state, KeyValueCache) else state[0].shape[2]
        if isinstance(state, KeyValueCache) and length + steps <= state.keys.shape[2]:
            return state
        keys, values = (
            F.pad(x[:, :, :length], (0, 0, 0, steps)) for x in state[:2]
        )  # not empty: what is not seen is multiplied by 0
        return KeyValueCache.of(keys, values, state[2], length)


def _attend_in_place(qk: Tensor, v: Tensor, cache: KeyValueCache, reset: Tensor | None) -> tuple[Tensor, KeyValueCache]:
    """Attention over all that the cache has room for. qk (2, B, heads, T, width), v (B, heads, T, width) -> like v."""
    places = cache.places[: v.shape[2]] + cache.length
    q, k = _rotate(qk, *cache.turns[places].unbind(1))
    cache.keys.index_copy_(2, places, k.to(cache.keys.dtype))
    cache.values.index_copy_(2, places, v.to(cache.values.dtype))
    starts = cache.start.expand(len(places), -1)
    if reset is not None:
        starts = torch.where(reset, places[:, None], starts).cummax(0).values
    hidden = ((cache.places > places[:, None]) | (cache.places < starts.t().unsqueeze(-1))).unsqueeze(1)
    keys, values = cache.keys.to(q.dtype), cache.values.to(q.dtype)
    if len(places) > 1:
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=~hidden)
    else:
        # Fused kernels that take a mask share no row's keys among blocks: over many keys, a step would wait for one.
        scores = (q * q.shape[-1] ** -0.5) @ keys.mT
        y = scores.masked_fill(hidden, -math.inf).softmax(-1, dtype=_at_least_float32(q.dtype)).to(v.dtype) @ values
    return y, cache._replace(start=starts[-1], length=cache.length + len(places))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the halves of x (..., T, width) against each other by the angles (T, width / 2) of its positions."""
    dtype = _at_least_float32(x.dtype)
    cos, sin = cosines.to(dtype), sines.to(dtype)
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def _rotary_angles(places: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, width / 2), in float64, of the angles at places (T,)."""
    # A float32 position of a million times a frequency is off by hundredths.
    frequencies = _ROTARY_BASE ** (-torch.arange(0, width, 2, device=places.device, dtype=torch.float64) / width)
    angles = torch.outer(places.double(), frequencies)
    return angles.cos(), angles.sin()


def _rotary_tables(first: int, steps: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``_rotary_angles`` at ``first`` and the places behind it."""
    return _rotary_angles(torch.arange(first, first + steps, device=device), width)


def _like_rotary_tables(first: int, steps: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    table = torch.empty(steps, (width + 1) // 2, device=device, dtype=torch.float64)
    return table, torch.empty_like(table)


# An op, lest a compiler fuses it into what it is multiplied by, and takes sines in float64 once a number of q and k.
register_opaque("rotary_tables", _rotary_tables, _like_rotary_tables)

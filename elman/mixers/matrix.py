"""A nonlinear recurrence with a large state: a matrix a head, written by the delta rule and squashed at every step.

    q, k, v, z, a, b = W_in x             q, k, v = silu(conv(q, k, v)) if so asked (short_conv.py)
    q, k             = q / |q|, k / |k|   in each head
    a, β             = σ(a + bias), c σ(b + bias)                        c: --beta-max
    S_t = tanh(a_t S_{t-1} + β_t k_t (v_t − a_t S_{t-1}ᵀ k_t)ᵀ)          one matrix (K, V) a head; v / --bound
    y_t = S_tᵀ q_t
    out = W_out (norm(y) ⊙ silu(z))       the norm over each head

With the identity in place of tanh it is a gated delta rule (Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024,
arXiv 2412.06464), whose projections, norms and gate these are. There are no recurrent weights: what is written depends
on what is remembered, and tanh bounds it, the less the smaller the values are; their scale itself the norm takes away.
To read S_{t-1}ᵀ k_t, not decayed, would be the same rule with β_t / a_t for β_t and a_t v_t for v_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers.base import ExpandedConfig, Mixer, MixerConfig, State, check_bound
from elman.mixers.short_conv import ShortConv
from elman.ops import matrix_recurrence, note_backend
from elman.ops.matrix import choose
from elman.ops.operators import real_of
from elman.options import OptionalInt, check_at_least

_NORM_EPS = 1e-5
_LENGTH_EPS = 1e-6
_FAST_WIDTH = 8
#: Beyond it a state without a bound would grow at every step.
_LARGEST_BETA = 2.0
#: What the heads forget a step at the start, from the slowest to the fastest.
_FORGOTTEN = (1e-3, 1e-1)


@dataclass(frozen=True)
class MatrixConfig(ExpandedConfig):
    """A matrix-valued state: about 5e weights in units of D² where K = V."""

    name: ClassVar[str] = "matrix"
    equation: ClassVar[str] = "S = tanh(a S + β k (v − a Sᵀk)ᵀ); y = norm(Sᵀq) * silu(z)"

    expansion: float = 1.0
    """Values of all heads as a multiple of the model width, where --heads is absent."""
    heads: OptionalInt = None
    """N, matrices a layer; as many as --expansion asks for if absent."""
    key_size: int = 32
    """K, rows of a head's matrix; the kernels fill it up to 16, 32, 64 or 128."""
    value_size: int = 32
    """V, columns of a head's matrix, likewise."""
    cell: Literal["tanh", "softsign", "identity"] = "tanh"
    """What bounds the state at every step; identity: nothing, which is a gated delta rule."""
    decay: Literal["head", "key", "none"] = "head"
    """What a step keeps: a number a head of the input, one of each row of the matrix, or all."""
    beta: Literal["head", "none"] = "head"
    """How far a step corrects what is read: by a number a head of the input, or wholly."""
    beta_max: float = 1.0
    """What that number stays below. Above 1 a step may turn round what is read at k, and so follow a parity, which a
    product of factors in [0, 1] cannot (Grazzi et al., 2024, arXiv 2411.12537)."""
    bound: float = 1.0
    """What v is divided by, which is as if the cell were bound f(S / bound), since the norm hides any scale of y. The
    larger, the nearer the cell is to linear."""
    conv: int = 0
    """Width of a short causal depthwise convolution of q, k and v, such as 4, and a silu behind it; 0 for neither."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, heads=1, key_size=1, value_size=1)
        if self.conv != 0 and not 2 <= self.conv <= 64:
            raise UsageError(f"--conv {self.conv} is out of range: give 0 for none, or a width from 2 to 64")
        if not 0 < self.beta_max <= _LARGEST_BETA:
            raise UsageError(f"--beta-max {self.beta_max} is out of range: give a number above 0 and up to 2")
        check_bound(self.bound)
        if self.beta == "none" and self.beta_max != 1.0:
            raise UsageError(f"--beta-max {self.beta_max} is of no use to --beta none, where β is 1: drop one of them")

    def build(self, dim: int) -> Matrix:
        return Matrix(dim, self)

    def pinned(self, dim: int) -> MixerConfig:
        return replace(self, heads=self.num_heads(dim))

    def num_heads(self, dim: int) -> int:
        """N at model width ``dim``."""
        return self.heads or max(1, round(self.expansion * dim / self.value_size))

    def sizes(self, dim: int) -> dict[str, int]:
        """What the first product makes, part by part: of q, k, v, z, and of the logits of a and β."""
        heads = self.num_heads(dim)
        decays = {"head": heads, "key": heads * self.key_size, "none": 0}
        keys, values = heads * self.key_size, heads * self.value_size
        shares = heads if self.beta == "head" else 0
        return {"q": keys, "k": keys, "v": values, "z": values, "decay": decays[self.decay], "beta": shares}

    def num_params(self, dim: int) -> int:
        sizes = self.sizes(dim)
        convolved = sizes["q"] + sizes["k"] + sizes["v"]
        biases = sizes["decay"] + sizes["beta"]
        return dim * sum(sizes.values()) + biases + self.conv * convolved + self.value_size + sizes["v"] * dim

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        """As in the base; of the state three products a head: with k to read, k and v to write, with q to show."""
        sizes = self.sizes(dim)
        state = 3 * self.num_heads(dim) * self.key_size * self.value_size
        return 2 * (dim * sum(sizes.values()) + state + sizes["v"] * dim)

    def state_size(self, dim: int, seq_len: int) -> int:
        """The heads' matrices, and the inputs that the convolution still sees."""
        sizes = self.sizes(dim)
        matrices = self.num_heads(dim) * self.key_size * self.value_size
        return matrices + max(0, self.conv - 1) * (sizes["q"] + sizes["k"] + sizes["v"])


class Matrix(Mixer):
    """See the top of this file; shapes as in ``Mixer.forward``.

    The state is S (B, N, K, V), never of a half type; with a convolution a pair of it and the last inputs of that.
    """

    def __init__(self, dim: int, config: MatrixConfig) -> None:
        super().__init__()
        heads = config.num_heads(dim)
        self.config, self.heads, self.sizes = config, heads, config.sizes(dim)
        #: Widths of q, k and v, and of z and the logits of a and β: what the first product makes, in this order.
        self._inputs, self._others = list(self.sizes.values())[:3], list(self.sizes.values())[3:]
        self.in_proj = nn.Linear(dim, sum(self.sizes.values()), bias=False)
        self.conv = ShortConv(self._inputs, config.conv, "silu") if config.conv else None
        if config.decay != "none":
            # Heads start with horizons from ten steps to a thousand, all rows of a head with the same.
            forgotten = torch.logspace(math.log10(_FORGOTTEN[0]), math.log10(_FORGOTTEN[1]), heads)
            self.decay_bias = nn.Parameter(-forgotten.logit().repeat_interleave(self.sizes["decay"] // heads))
        if config.beta != "none":
            self.beta_bias = nn.Parameter(torch.zeros(heads))
        self.norm = nn.RMSNorm(config.value_size, eps=_NORM_EPS)
        self.out_proj = nn.Linear(self.sizes["v"], dim, bias=False)

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        *parts, rest = self._project(x)
        z, decay, beta = rest[..., : sum(self._others)].split_with_sizes(self._others, dim=-1)
        if self.conv is not None:
            state, last = (None, None) if state is None else state
            parts, last = self.conv(parts, last, reset)
        q, k, v = (part.reshape(*part.shape[:2], self.heads, -1) for part in parts)
        if self.config.bound != 1.0:
            v = v / self.config.bound
        # The kernels read v as it lies: copied here, and not once by each of them.
        q, k, v = _of_length_one(q), _of_length_one(k), v.contiguous()
        note_backend(f"matrix_{choose('auto', q.device, q.dtype, q.shape[-1], v.shape[-1])}")
        y, s = matrix_recurrence(q, k, v, *self._gates(decay, beta), state, cell=self.config.cell, reset=reset)
        real = real_of(y.dtype)
        y = F.rms_norm(y.to(real), self.norm.normalized_shape, self.norm.weight.to(real), self.norm.eps)
        y = y * F.silu(z.to(real).reshape(y.shape))
        return self.out_proj(y.flatten(2).to(x.dtype)), s if self.conv is None else (s, last)

    def _project(self, x: Tensor) -> list[Tensor]:
        """q, k and v, and the others, with what fills these up to a fast width.

        Where gradients are taken, by a product each: those of parts of one product would first be put side by side, and
        that takes longer than a few products more.
        """
        sizes = [*self._inputs, sum(self._others)]
        weight = self.in_proj.weight
        if x.is_cuda and (missing := -sizes[-1] % _FAST_WIDTH):
            sizes[-1] += missing
            weight = F.pad(weight, (0, 0, 0, missing))
        if torch.is_grad_enabled():
            return [F.linear(x, part) for part in weight.split_with_sizes(sizes)]
        return list(F.linear(x, weight).split_with_sizes(sizes, dim=-1))

    def _gates(self, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """A and β of their logits (T, B, .), never of a half type: that would round what is near 1 to 1."""
        real = real_of(decay.dtype)
        ones = torch.ones(1, dtype=real, device=decay.device).expand(*decay.shape[:2], self.heads)
        kept, shares = ones, ones
        if self.config.decay != "none":
            kept = torch.sigmoid(decay.to(real) + self.decay_bias.to(real))
        if self.config.decay == "key":
            kept = kept.view(*kept.shape[:2], self.heads, -1)
        if self.config.beta != "none":
            shares = self.config.beta_max * torch.sigmoid(beta.to(real) + self.beta_bias.to(real))
        return kept, shares


def _of_length_one(x: Tensor) -> Tensor:
    # By the norm of the mean, whose gradient a compiler takes without a power of every number.
    size = x.shape[-1]
    unit: Tensor = F.rms_norm(x.to(real_of(x.dtype)), (size,), eps=_LENGTH_EPS / size) * size**-0.5
    return unit.to(x.dtype)

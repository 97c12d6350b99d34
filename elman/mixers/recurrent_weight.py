"""The recurrent matrix W_h: a structure, a constraint and a start, composed into a ``weight`` that the op takes.

    dense                W                                      d²
    block_diagonal       diag(W_1 ... W_N)                      d²/N             heads that do not see each other
    diagonal             diag(w)                                d
    low_rank             U V                                    2 d r            U (d, r), V (r, d)
    monarch              Pᵀ L P R                               d (a + d/a)      R: a blocks, L: d/a blocks (Dao, 2022)
    sparse_low_rank      S + U V                                k d + 2 d r      S: k entries a row, at fixed places
    random_projection    A M Aᵀ                                 r²               A (d, r): fixed, random, orthonormal

    spectral_norm        W · min(1, ρ / σ(W)) or W · ρ / σ(W)   σ: the largest singular value (Miyato et al., 2018)
    scaled_orthogonal    sigmoid(s) Q                           Q: fixed, orthogonal; s: the one number learned

The first three, the low-rank pair and the random projection (the pair A, M Aᵀ) keep their form, in which a step costs
less; the others are made dense once a call, which is little beside its steps.

Sources: T. Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022;
T. Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018; Q. V. Le et al., "A Simple
Way to Initialize Recurrent Networks of Rectified Linear Units", 2015 (identity).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers.base import FollowsWeights, RecurrentConfig, round_width

Structure = Literal[
    "dense", "block_diagonal", "diagonal", "low_rank", "monarch", "sparse_low_rank", "random_projection"
]
#: What ``elman.ops.recurrence`` takes: a tensor or a low-rank pair.
Weight = Tensor | tuple[Tensor, Tensor]

#: The bound on σ: below 1, so that a linear recurrence would forget.
_RHO = 0.99
#: Where orthogonal matrices start: just inside the unit circle, so that neither states nor gradients grow or fade.
_INSIDE = 0.999
#: Of the power method, after each step of the optimiser; one lags behind where several singular values grow at a time.
_ITERATIONS = 4


@dataclass(frozen=True)
class WeightOptions(RecurrentConfig):
    """Options of every recurrent matrix, whatever its structure."""

    constraint: Literal["free", "spectral_norm", "scaled_orthogonal"] = "free"
    """What holds W_h: nothing, a bound of 0.99 on its largest singular value, or sigmoid(s) Q with Q a fixed orthogonal
    matrix and s learned."""
    spectral_mode: Literal["cap", "rescale"] = "cap"
    """spectral_norm scales W_h down only where it exceeds the bound (cap), or always to the bound (rescale)."""
    init: Literal["orthogonal", "identity", "xavier", "normal"] = "orthogonal"
    """How W_h starts: 0.999 times an orthogonal matrix (of low rank: one on a subspace) or the identity; Gaussian with
    Xavier's variance and a gain of 0.1; or N(0, 0.02)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spectral_mode != "cap" and self.constraint != "spectral_norm":
            raise UsageError(
                f"--spectral-mode {self.spectral_mode} means nothing to --constraint {self.constraint}: "
                f"drop it, or give --constraint spectral_norm"
            )
        if self.constraint == "scaled_orthogonal" and self.init not in ("orthogonal", "identity"):
            raise UsageError(
                f"--init {self.init} does not go with --constraint scaled_orthogonal, whose matrix is orthogonal: "
                f"give --init orthogonal or identity"
            )


def slow_rank(rank: int | None) -> str | None:
    """``MixerConfig.slow_option`` of a given rank: tensor cores read rows of 8 numbers."""
    if rank is None or rank == (faster := round_width(rank)):
        return None
    return f"--rank {rank} is no multiple of 8, which makes its products slow on a GPU: give --rank {faster}"


@dataclass(frozen=True)
class WeightConfig:
    """A recurrent matrix of known sizes.

    Attributes:
        size: d, the units.
        options: constraint and start.
        structure: which of those above.
        heads: blocks on the diagonal: 1 if dense, N, or d; of a monarch matrix those of R. They divide the size.
        rank: r, where there is one.
        row_entries: k, the entries of S a row.
        products: P, the recurrent products of the cell. If more than 1, every tensor has P in front.
    """

    size: int
    options: WeightOptions
    structure: Structure = "dense"
    heads: int = 1
    rank: int = 0
    row_entries: int = 0
    products: int = 1

    @property
    def front(self) -> tuple[int, ...]:
        """What every tensor's shape begins with."""
        return () if self.products == 1 else (self.products,)

    def num_params(self) -> int:
        """Learned numbers."""
        return self.products * self._kind.num_params(self)

    def flops_per_token(self) -> int:
        """FLOPs of a step's product a row. Composing the weight, once a call, is left out."""
        return self.products * self._kind.flops_per_token(self)

    def build(self) -> RecurrentWeight:
        """The module.

        Raises:
            UsageError: the rank exceeds the size.
        """
        if self.rank > self.size:
            raise UsageError(
                f"--rank {self.rank} is more than the {self.size} units of W_h: give at most {self.size}, or more units"
            )
        weight = self._kind(self)
        return SpectralNorm(self, weight) if self.options.constraint == "spectral_norm" else weight

    @property
    def _kind(self) -> type[Composed]:
        return ScaledOrthogonal if self.options.constraint == "scaled_orthogonal" else _STRUCTURES[self.structure]


class RecurrentWeight(nn.Module, ABC):
    """A module without input whose output is W_h, in the dtype of its parameters under autocast too."""

    def forward(self) -> Weight:
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self.compose()

    @abstractmethod
    def compose(self) -> Weight:
        """W_h in a form that the op takes."""


class Composed(RecurrentWeight):
    """One of the structures, and what a single product of it counts."""

    def __init__(self, config: WeightConfig) -> None:
        super().__init__()
        self.recurrent_lr = config.options.recurrent_lr

    @property
    def lr_multiples(self) -> dict[str, float]:
        """All that is learned of it takes one rate."""
        return {name: self.recurrent_lr for name, _ in self.named_parameters(recurse=False)}

    @staticmethod
    @abstractmethod
    def num_params(config: WeightConfig) -> int: ...

    @staticmethod
    def flops_per_token(config: WeightConfig) -> int:
        return 2 * config.size * config.size


class Blocks(Composed):
    """Dense, block-diagonal and diagonal: square blocks on the diagonal, one of them, N or d."""

    def __init__(self, config: WeightConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(_blocks(config, _INSIDE))
        # Blocks of one unit are how much each keeps of itself.
        self.no_decay = frozenset({"weight"} if config.heads == config.size else ())

    def compose(self) -> Weight:
        return self.weight

    @staticmethod
    def num_params(config: WeightConfig) -> int:
        return config.size * (config.size // config.heads)

    @staticmethod
    def flops_per_token(config: WeightConfig) -> int:
        """A diagonal's product is pointwise work, which does not count."""
        return 0 if config.structure == "diagonal" else 2 * Blocks.num_params(config)


class ScaledOrthogonal(Composed):
    """``sigmoid(s) Q``: no product of such matrices can grow, and W_h shrinks all states alike."""

    no_decay = frozenset({"s"})

    def __init__(self, config: WeightConfig) -> None:
        super().__init__(config)
        self.s = nn.Parameter(torch.full(config.front, math.log(_INSIDE / (1 - _INSIDE))))
        self.register_buffer("q", _blocks(config, 1.0))
        self.q: Tensor

    def compose(self) -> Weight:
        return _scaled(self.q, self.s.sigmoid())

    @staticmethod
    def num_params(config: WeightConfig) -> int:
        return 1

    flops_per_token = staticmethod(Blocks.flops_per_token)


class LowRank(Composed):
    """``U V``."""

    def __init__(self, config: WeightConfig) -> None:
        super().__init__(config)
        u, v = _low_rank(config)
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)

    def compose(self) -> Weight:
        return self.u, self.v

    @staticmethod
    def num_params(config: WeightConfig) -> int:
        return 2 * config.size * config.rank

    @staticmethod
    def flops_per_token(config: WeightConfig) -> int:
        return 2 * 2 * config.size * config.rank


class Monarch(Composed):
    """``Pᵀ L P R``: with the state laid out (a, b), R mixes along b in each of a rows, L along a in each of b columns.

    So every unit hears every other, each pair by one path.
    """

    def __init__(self, config: WeightConfig) -> None:
        super().__init__(config)
        a = config.heads
        b = config.size // a
        self.right = nn.Parameter(_square(config, a, b, b, factors=2))
        self.left = nn.Parameter(_square(config, b, a, a, factors=2))

    def compose(self) -> Weight:
        paths = torch.einsum("...kli,...ikj->...lkij", self.left, self.right)
        return paths.flatten(-4, -3).flatten(-2)

    @staticmethod
    def num_params(config: WeightConfig) -> int:
        return config.size * (config.heads + config.size // config.heads)


class SparseLowRank(LowRank):
    """``S + U V``: each unit hears k others, drawn once, by weights of their own. S starts at 0."""

    no_matrix = frozenset({"entries"})

    def __init__(self, config: WeightConfig) -> None:
        super().__init__(config)
        d, k = config.size, config.row_entries
        self.entries = nn.Parameter(torch.zeros(*config.front, d, k))
        self.register_buffer("places", torch.rand(*config.front, d, d).topk(k).indices)
        self.places: Tensor

    def compose(self) -> Weight:
        return (self.u @ self.v).scatter_add(-1, self.places, self.entries)

    @staticmethod
    def num_params(config: WeightConfig) -> int:
        return LowRank.num_params(config) + config.size * config.row_entries

    flops_per_token = staticmethod(Composed.flops_per_token)


class RandomProjection(Composed):
    """``A M Aᵀ``: the state is read and written in r fixed random directions, and M is learned between them."""

    def __init__(self, config: WeightConfig) -> None:
        super().__init__(config)
        d, r = config.size, config.rank
        self.middle = nn.Parameter(_square(config, r, r, spread=d / r))
        self.register_buffer("basis", _orthogonal(*config.front, d, r))
        self.basis: Tensor

    def compose(self) -> Weight:
        return self.basis, self.middle @ self.basis.mT

    @staticmethod
    def num_params(config: WeightConfig) -> int:
        return config.rank * config.rank

    flops_per_token = staticmethod(LowRank.flops_per_token)


_STRUCTURES: dict[str, type[Composed]] = {
    "dense": Blocks,
    "block_diagonal": Blocks,
    "diagonal": Blocks,
    "low_rank": LowRank,
    "monarch": Monarch,
    "sparse_low_rank": SparseLowRank,
    "random_projection": RandomProjection,
}


class SpectralNorm(RecurrentWeight, FollowsWeights):
    """Another weight, scaled so that its largest singular value σ is at most ρ (cap) or exactly ρ (rescale).

    σ = |W x|, x being the singular vector that power iteration found (one a block). Its gradient is that of σ, since a
    singular vector's own change does not move σ to first order. x is a buffer: a run resumed from a checkpoint has the
    same. It goes on after each step of the optimiser and not in the forward pass, so that a sequence run in chunks, or
    run again, meets one and the same W. Where an optimiser's step moves σ far, the bound is exceeded for some steps,
    until x has followed.
    """

    def __init__(self, config: WeightConfig, unscaled: Composed) -> None:
        super().__init__()
        self.config = config
        self.unscaled = unscaled
        last = self._factors(unscaled.compose())[-1]
        self.register_buffer("vector", torch.randn(*last.shape[:-2], last.shape[-1], 1))
        self.vector: Tensor
        for _ in range(10):
            self.after_step()

    def compose(self) -> Weight:
        weight = self.unscaled.compose()
        sigma = self._product(self._factors(weight)).norm(dim=-2).amax(dim=(-2, -1))
        least = _RHO if self.config.options.spectral_mode == "cap" else torch.finfo(sigma.dtype).tiny
        scale = _RHO / sigma.clamp(min=least)
        return (_scaled(weight[0], scale), weight[1]) if isinstance(weight, tuple) else _scaled(weight, scale)

    @torch.no_grad()
    def after_step(self) -> None:
        """A few power iterations."""
        factors = self._factors(self.unscaled.compose())
        for _ in range(_ITERATIONS):
            x = self._product(factors)
            for factor in factors:
                x = factor.mT @ x
            norm = x.norm(dim=-2, keepdim=True)
            # Of a block that is all zeros, every vector is singular: keep the one there is, which will serve later.
            self.vector.copy_(torch.where(norm > 0, x / norm, self.vector))

    def _product(self, factors: list[Tensor]) -> Tensor:
        """W x, by block."""
        x = self.vector
        for factor in reversed(factors):
            x = factor @ x
        return x

    def _factors(self, weight: Weight) -> list[Tensor]:
        """The weight's blocks as a product of matrices (P, N, rows, columns)."""
        if isinstance(weight, tuple):
            return [factor.unsqueeze(-3) for factor in weight]
        front, size = self.config.front, self.config.size
        part = weight.numel() // (self.config.products * size)
        return [weight.view(*front, size // part, part, part)]


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight times one number for each of its products."""
    return weight * scale.view(*scale.shape, *(1,) * (weight.ndim - scale.ndim))


def _blocks(config: WeightConfig, inside: float) -> Tensor:
    """Square blocks in the form that the op knows them by: (d, d), (N, d/N, d/N) or (d,)."""
    part = config.size // config.heads
    blocks = _square(config, config.heads, part, part, inside=inside)
    form = {"dense": (part, part), "diagonal": (config.size,)}.get(config.structure, blocks.shape[-3:])
    return blocks.view(*config.front, *form)


def _square(
    config: WeightConfig, *shape: int, factors: int = 1, inside: float = _INSIDE, spread: float = 1.0
) -> Tensor:
    """(P, *shape) of square matrices, as ``init`` says.

    ``factors`` of them, one entry of each, make an entry of W_h by being multiplied. ``spread`` widens Gaussians.
    """
    match config.options.init:
        case "orthogonal":
            return math.pow(inside, 1 / factors) * _orthogonal(*config.front, *shape)
        case "identity":
            return math.pow(inside, 1 / factors) * torch.eye(shape[-1]).expand(*config.front, *shape).clone()
    return spread * math.pow(_entry_std(config), 1 / factors) * torch.randn(*config.front, *shape)


def _low_rank(config: WeightConfig) -> tuple[Tensor, Tensor]:
    """U (P, d, r) and V (P, r, d), whose product is orthogonal on a subspace or has entries of ``init``'s variance."""
    d, r = config.size, config.rank
    if config.options.init in ("orthogonal", "identity"):
        # U and V of one basis: if each had its own, a state would shrink by about √(r/d) a step.
        basis = _orthogonal(*config.front, d, r)
        return math.sqrt(_INSIDE) * basis, _square(config, r, r, inside=math.sqrt(_INSIDE)) @ basis.mT
    std = math.sqrt(_entry_std(config) / math.sqrt(r))
    return std * torch.randn(*config.front, d, r), std * torch.randn(*config.front, r, d)


def _entry_std(config: WeightConfig) -> float:
    """Of the entries of W_h that are not always 0."""
    if config.options.init == "normal":
        return 0.02
    heard = config.size // config.heads if _STRUCTURES[config.structure] is Blocks else config.size
    return 0.1 / math.sqrt(heard)


def _orthogonal(*shape: int) -> Tensor:
    """(..., m, n) with orthonormal columns, m ≥ n, uniformly drawn; QR alone would not be (Mezzadri, 2007)."""
    q, r = torch.linalg.qr(torch.randn(*shape))
    columns: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return columns.contiguous()

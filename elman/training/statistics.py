"""What goes on inside a model in training, layer by layer, every so many steps.

    residual_rms       root mean square of the residual stream behind each layer
    saturation         part of the recurrent units' values with |h| > 0.99; no cell's exceed 1
    recurrent_norm     the largest singular value of W_h, an estimate from below
    recurrent_radius   the largest magnitude of its eigenvalues, an estimate: how fast products of W_h alone grow
    grad_norm          norm of the gradient of each layer's parameters, before it is clipped
    embedding_grad_norm    of the embedding, which is the head too, and the last norm

All are lists by layer but the last; a layer without a recurrence has None. Where a cell has several recurrent products,
or heads, the largest of them counts.

The activations are those of one more forward pass, over the first few rows of the step's batch and plain: compiled
layers hide what is inside them, and hooks would have them compiled anew. It draws no random numbers and changes
nothing, so that a run's losses are the same bits with and without it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from elman.mixers import State
from elman.model import LanguageModel
from elman.ops import watch_recurrences
from elman.ops.operators import Diagonal, Operator

#: Rows of the batch that are looked at: a forward pass over them takes less than 1% of a hundred steps at any size.
_ROWS = 8
_SATURATED = 0.99
#: Products that a singular vector is found by, forth and back counting as one, and an eigenvector; the latter are
#: measured over the second half, and the vectors that are tried keep their lengths in bounds for so many products.
_SINGULAR_STEPS, _EIGEN_STEPS, _UNBOUNDED = 12, 64, 4
_VECTORS = 4

_BY_LAYER = ("residual_rms", "saturation", "recurrent_norm", "recurrent_radius")


class LayerStatistics:
    """The statistics of a model, every ``every`` steps; never if that is 0."""

    def __init__(self, model: LanguageModel, every: int) -> None:
        self.model = model
        self.every = every
        self._groups = _groups(model)
        sizes = [len(group) for group in self._groups]
        parameter = next(model.parameters())
        #: (groups, parameters): true where the parameter is of the group.
        of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self._members = (of == torch.arange(len(sizes)).unsqueeze(1)).to(parameter.device)

    def due(self, step: int) -> bool:
        """Whether the step of this number, from 1 on, is one to look at."""
        return self.every > 0 and step % self.every == 0

    @torch.no_grad()
    def look(
        self,
        tokens: Tensor,
        state: State,
        reset: Tensor | None,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> Tensor:
        """The statistics of a forward pass, on the device and not waited for.

        Args:
            tokens: (B, T), which the step reads.
            state: of their rows, or None for rest.
            reset: (B, T) bool, or None.
            autocast: makes the context that the step's forward pass runs in.

        Returns:
            (4 * layers,) float32, NaN where a layer has none; ``as_row`` names them.
        """
        rows = min(_ROWS, len(tokens))
        state = None if state is None else tree_map(lambda leaf: leaf[:rows], state)
        found: dict[str, dict[int, Tensor]] = {name: {} for name in _BY_LAYER}
        layer = 0

        def enter(module: Any, arguments: Any) -> None:
            nonlocal layer
            layer = places[module]

        def leave(module: Any, arguments: Any, output: tuple[Tensor, Tensor, State]) -> None:
            found["residual_rms"][layer] = output[0].float().square().mean().sqrt()

        def watch(operator: Operator, h: Tensor) -> None:
            found["saturation"][layer] = (h.float().abs() > _SATURATED).float().mean()
            found["recurrent_norm"][layer], found["recurrent_radius"][layer] = norm_and_radius(operator)

        places = {module: index for index, module in enumerate(self.model.layers)}
        handles = [module.register_forward_pre_hook(enter) for module in places]
        handles += [module.register_forward_hook(leave) for module in places]
        self.model.eval()  # the plain path
        try:
            with watch_recurrences(watch), autocast():
                self.model(tokens[:rows], state, None if reset is None else reset[:rows])
        finally:
            self.model.train()
            for handle in handles:
                handle.remove()
        absent = torch.full((), math.nan, device=tokens.device)
        return torch.stack([found[name].get(index, absent) for name in _BY_LAYER for index in range(len(places))])

    def gradient_norms(self) -> Tensor:
        """(1 + layers,) float32: of what is outside the layers, and of each layer; on the device, not waited for."""
        parameters = [parameter for group in self._groups for parameter in group]
        gradients = [p.new_zeros(1) if p.grad is None else p.grad for p in parameters]
        squares = torch.stack([_whole(norm) for norm in torch._foreach_norm(gradients)]).square()
        # No product with zeros: what is infinite in one layer is none of the others'.
        return squares.where(self._members, 0).sum(1).sqrt()

    def as_row(self, numbers: Sequence[float]) -> dict[str, Any]:
        """What ``gradient_norms`` and then ``look`` returned, by name; None is what was not finite, or not there."""
        values = [value if math.isfinite(value) else None for value in numbers]
        layers = len(self.model.layers)
        outside, of_layers, *rest = values[0], values[1 : layers + 1], values[layers + 1 :]
        parts = [rest[0][i * layers : (i + 1) * layers] for i in range(len(_BY_LAYER))]
        named = {**dict(zip(_BY_LAYER, parts, strict=True)), "grad_norm": of_layers}
        return {
            **{name: part for name, part in named.items() if any(value is not None for value in part)},
            "embedding_grad_norm": outside,
        }


def _groups(model: LanguageModel) -> list[list[torch.nn.Parameter]]:
    """The parameters outside the layers, and those of each layer."""
    layers = [list(layer.parameters()) for layer in model.layers]
    inside = {id(parameter) for layer in layers for parameter in layer}
    return [[parameter for parameter in model.parameters() if id(parameter) not in inside], *layers]


def _whole(norm: Tensor) -> Tensor:
    """The norm of a gradient that is shared by several devices, on each of them."""
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def norm_and_radius(operator: Operator) -> tuple[Tensor, Tensor]:
    """Estimates of the largest singular value and of the largest magnitude of an eigenvalue, over all of its blocks.

    Returns:
        Two float32 scalars on its device, not waited for.
    """
    factors = [weight.detach().float() for weight in operator.weights]
    if isinstance(operator, Diagonal):
        largest = factors[0].abs().amax()
        return largest, largest
    start = _start(factors[-1].shape[-1], factors[-1].device)
    x = start.expand(*factors[-1].shape[:-2], *start.shape)
    for _ in range(_SINGULAR_STEPS):
        x = x / _length(x)
        image = _product(factors, x)
        x = _product([factor.mT for factor in reversed(factors)], image)
    norm = _length(image).amax()
    x, grown = start.expand_as(x), torch.zeros((), device=x.device)
    for step in range(0, _EIGEN_STEPS, _UNBOUNDED):
        for _ in range(_UNBOUNDED):
            x = _product(factors, x)
        length = _length(x)
        x = x / length
        if step >= _EIGEN_STEPS // 2:
            grown = grown + length.log()
    return norm, (grown / (_EIGEN_STEPS // 2)).exp().amax()


def _product(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    for factor in reversed(factors):
        x = factor @ x
    return x


def _length(x: Tensor) -> Tensor:
    """Of each vector; above zero, so that what has become zero can be divided by it."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return length.clamp(min=torch.finfo(x.dtype).tiny)


@functools.cache
def _start(size: int, device: torch.device) -> Tensor:
    """(size, vectors): always the same random ones, by a generator of their own."""
    start: Tensor = torch.randn(size, _VECTORS, generator=torch.Generator().manual_seed(size)).to(device)
    return start

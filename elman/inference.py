"""A model that will not be trained any more, made ready to be run step by step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elman.mixers.recurrent_weight import RecurrentWeight, Weight
from elman.model import LanguageModel


class Composed(nn.Module):
    """A recurrent weight as it was composed once."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        for i, part in enumerate(weight if isinstance(weight, tuple) else (weight,)):
            self.register_buffer(f"part_{i}", part.detach().contiguous())

    def forward(self) -> Weight:
        parts: tuple[Tensor, ...] = tuple(self.buffers())
        return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def freeze(model: LanguageModel, dtype: torch.dtype | None = None) -> LanguageModel:
    """Do once, in place, what every call would do: compose recurrent weights, round to autocast's dtype.

    A step of one token reads every weight once, so the time that it takes is that of reading them. The model computes
    what it computed before, under autocast to ``dtype`` where that is given: the same bits.

    Args:
        model: in evaluation mode; it cannot be trained or saved any more.
        dtype: what autocast will round the products' weights to; None leaves them.

    Returns:
        The model itself.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RecurrentWeight):
                setattr(module, name, Composed(child()))
    if dtype is not None:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.RNNBase | Composed):
                module.to(dtype)
    return model.requires_grad_(False)

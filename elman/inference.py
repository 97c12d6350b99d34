"""A model that will not be trained any more, made ready to be run step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from elman.environment import is_out_of_memory, supports_bf16
from elman.errors import UsageError
from elman.mixers.recurrent_weight import RecurrentWeight, Weight
from elman.model import LanguageModel


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What ``--precision auto|bf16|fp32`` rounds products to on a device; None: nothing.

    Raises:
        UsageError: bf16, on a GPU without it.
    """
    if precision == "bf16" and device.type == "cuda" and not supports_bf16(device):
        raise UsageError(f"--precision bf16: {device} does not multiply bf16 in hardware: give --precision fp32")
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and supports_bf16(device)) else None


@contextlib.contextmanager
def advise_on_memory(asked: str, cure: str) -> Iterator[None]:
    """What is inside may run out of memory for what was asked.

    Raises:
        UsageError: it did; the message is made of both.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first, *_ = str(error).splitlines() or ["no message"]
        raise UsageError(f"{asked}: out of memory ({first}): {cure}") from None


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

"""Large products in 8-bit floating point, by torchao: ``--precision fp8``.

Each of a product's three matrices (input, weight, gradient) is scaled as a whole to what float8_e4m3 (of gradients,
e5m2) holds and rounded, at every step, and the tensor cores multiply them with float32 sums (Micikevicius et al., "FP8
formats for deep learning", 2022, arXiv 2209.05433). Weights stay float32, activations between the products bf16.

In training alone: evaluation multiplies in bf16, as the saved model does wherever it is loaded.

Linear layers take part whose sides are multiples of 16, as the tensor cores ask, and long enough to pay. The embedding,
which is the head too, and recurrent weights do not: what is fed back to itself would be rounded at every step.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.errors import UsageError

_MULTIPLE = 16
#: The shorter side of a product that pays: below, rounding takes longer than the faster product saves.
_LEAST_SIDE = 256
_OLDEST = (8, 9)


def check_float8(device: torch.device, tokens: int) -> None:
    """A device and a package for it are there, and a pass over so many tokens can be multiplied.

    Raises:
        UsageError: not so.
    """
    if device.type != "cuda":
        raise UsageError(f"--precision fp8 needs an NVIDIA GPU, not device {device}: give --precision auto")
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        raise UsageError(
            f"--precision fp8 needs compute capability 8.9 (Ada, Hopper) or newer, not "
            f"{'.'.join(map(str, capability))}: give --precision bf16"
        )
    if tokens % _MULTIPLE:
        raise UsageError(
            f"--precision fp8 multiplies {_MULTIPLE} tokens at a time, and a pass has {tokens}: give a --batch-size or "
            f"--seq-len that makes it a multiple"
        )
    _torchao()


def takes_part(module: nn.Module, name: str = "") -> bool:
    """Whether this is a linear layer whose product is made in 8 bits."""
    if not isinstance(module, nn.Linear):
        return False
    sides = module.in_features, module.out_features
    return min(sides) >= _LEAST_SIDE and all(side % _MULTIPLE == 0 for side in sides)


def use_float8(model: nn.Module, *, emulate: bool = False) -> int:
    """Have the linear layers that take part multiply in 8 bits, keeping their weights, names and places.

    ``emulate``: in float32, rounded to what 8 bits hold, as any device can. Returns how many do.

    Raises:
        UsageError: none is large enough, or torchao is not installed.
    """
    count = sum(takes_part(module) for module in model.modules())
    if not count:
        raise UsageError(
            f"--precision fp8: no linear layer of this model has sides that are multiples of {_MULTIPLE} and at least "
            f"{_LEAST_SIDE}: give a wider model, or --precision bf16"
        )
    float8 = _torchao()
    config = float8.Float8LinearConfig(emulate=emulate)
    float8.convert_to_float8_training(model, config=config, module_filter_fn=takes_part)
    layers = [module for module in model.modules() if takes_part(module)]
    trained = _in_training(type(layers[0]))
    for layer in layers:
        layer.__class__ = trained
    return count


def _in_training(layer: type[nn.Module]) -> type[nn.Module]:
    """Such a layer that is a plain one in evaluation; torchao's tensors know no inference mode either."""

    class TrainedLinear(layer):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else F.linear(x, self.weight, self.bias)

    return TrainedLinear


def _torchao() -> Any:
    """The package's part for training.

    Raises:
        UsageError: it is not there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # It tells of kernels of its own that were built for another PyTorch, none of which is called here.
            logging.getLogger("torchao").setLevel(logging.ERROR)
            import torchao.float8
    except ImportError as error:
        raise UsageError(
            f"--precision fp8 needs torchao ({error}): pip install torchao, or give --precision bf16"
        ) from None
    return torchao.float8

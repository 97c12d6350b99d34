"""Any layer of flash-linear-attention by its name: ``fla:GatedDeltaNet``, ``fla:GLA``, ``fla:RWKV7``, …

Source: https://github.com/fla-org/flash-linear-attention. Its layers run on a GPU only.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from elman.errors import UsageError
from elman.mixers.base import Mixer, MixerConfig, State, WeightInit
from elman.ops import note_backend

PREFIX = "fla:"


@dataclass(frozen=True)
class FLAConfig(MixerConfig):
    """A layer as its package makes it at the model's width; see its documentation there."""

    layer: ClassVar[type[nn.Module]]

    options: str = "{}"
    """The layer's keyword arguments as JSON, such as '{"num_heads": 4}'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = inspect.signature(self.layer).parameters
        unknown = set(self._arguments()) - set(known)
        if unknown:
            raise UsageError(
                f"--options {self.options}: {self.name} takes no {', '.join(sorted(unknown))}: "
                f"it takes {', '.join(name for name in known if name not in _OURS)}"
            )

    def build(self, dim: int) -> FLA:
        return FLA(self, self.make(dim))

    def make(self, dim: int) -> nn.Module:
        """The package's own module.

        Raises:
            UsageError: it has none of this width.
        """
        # Each layer has a cache of its own, and so is the first in it. Some start their weights by their place in the
        # model, of which that needs to have two layers at least.
        ours = {"hidden_size": dim, "layer_idx": 0, "num_hidden_layers": 2}
        known = inspect.signature(self.layer).parameters
        try:
            return self.layer(**{name: value for name, value in ours.items() if name in known} | self._arguments())
        except (AssertionError, ValueError, TypeError, ZeroDivisionError) as error:
            raise UsageError(
                f"{self.name} cannot be made at width {dim} ({error}): give another --dim, --params or --options"
            ) from None

    def check_device(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UsageError(f"--model {self.name} runs on a GPU only: give --device cuda, or another --model")

    def num_params(self, dim: int) -> int:
        return sum(parameter.numel() for parameter in _on_paper(self, dim).parameters())

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        """Those of its linear maps; what the layer's kernel does with its state is not known here."""
        linear = (module for module in _on_paper(self, dim).modules() if isinstance(module, nn.Linear))
        return sum(2 * module.weight.numel() for module in linear)

    def state_size(self, dim: int, seq_len: int) -> int:
        """A matrix a head and the inputs of short convolutions, as far as the layer's attributes tell."""
        layer = _on_paper(self, dim)
        heads = _first(layer, "num_v_heads", "num_heads")
        key = _first(layer, "head_k_dim", "head_dim")
        value = _first(layer, "head_v_dim", "head_dim")
        convolutions = sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Conv1d))
        return heads * key * value + convolutions

    def _arguments(self) -> dict[str, Any]:
        try:
            arguments = json.loads(self.options)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict) or _OURS & set(arguments):
            raise UsageError(
                f"--options {self.options!r} is no JSON object of the layer's arguments: give one such as "
                f'{{"num_heads": 4}}; the width comes from --dim'
            )
        return arguments


def _first(layer: nn.Module, *names: str) -> int:
    return int(next((value for name in names if (value := getattr(layer, name, None))), 0))


_OURS = {"hidden_size", "layer_idx"}


@functools.lru_cache(maxsize=1024)
def _on_paper(config: FLAConfig, dim: int) -> nn.Module:
    """Shapes without memory."""
    with torch.device("meta"):
        return config.make(dim)


def fla_config(name: str) -> type[FLAConfig]:
    """The config class of ``fla:NAME``, NAME being a layer's class, with or without the word Attention, or its module.

    Raises:
        UsageError: the package is not installed, or has no such layer.
    """
    return _config_of(_find_layer(name.removeprefix(PREFIX)))


@functools.cache
def _config_of(layer: Any) -> type[FLAConfig]:
    """The same class for the same layer, so that equal configs are equal."""
    fields = {"name": PREFIX + layer.__name__, "equation": f"{layer.__name__} of flash-linear-attention"}
    made = type(f"FLA{layer.__name__}Config", (FLAConfig,), {**fields, "layer": layer})
    return dataclass(frozen=True)(made)


def _find_layer(name: str) -> Any:
    """The layer's class, a subclass of ``nn.Module``."""
    try:
        package = importlib.import_module("fla.layers")
    except Exception as error:
        raise UsageError(
            f"--model {PREFIX}{name} needs flash-linear-attention, which cannot be imported here "
            f"({type(error).__name__}: {error}): pip install flash-linear-attention, on a machine with a GPU"
        ) from None
    layers = [getattr(package, exported) for exported in package.__all__]
    layers = [layer for layer in layers if "hidden_size" in inspect.signature(layer).parameters]
    for layer in layers:
        module = layer.__module__.rpartition(".")[2]
        known_as = (layer.__name__, layer.__name__.removesuffix("Attention"), module)
        if name.lower() in map(str.lower, known_as):
            return layer
    names = ", ".join(layer.__name__ for layer in layers)
    raise UsageError(f"--model {PREFIX}{name}: flash-linear-attention has no such layer; it has {names}")


class FLA(Mixer):
    """Shapes as in ``Mixer.forward``; the state is what the layer keeps in its package's cache, without empty parts."""

    def __init__(self, config: FLAConfig, layer: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.layer = layer

    @property
    def compiles(self) -> bool:
        return False

    def initialize(self, weight_init: WeightInit = "normal") -> None:
        """The weights stay as the layer drew them, which for some layers is part of their definition."""

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        note_backend(self.config.name)
        if reset is None:
            y, state = self._run(x, state)
            return y, state
        # The layers cannot reset rows apart, so a chunk is cut wherever a row resets.
        cuts = reset.any(1).nonzero().flatten().tolist()
        pieces = []
        for first, end in itertools.pairwise(sorted({0, *cuts, len(x)})):
            y, state = self._run(x[first:end], _without(state, reset[first]))
            pieces.append(y)
        return torch.cat(pieces), state

    def _run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        cache_type = importlib.import_module("fla.models.utils").Cache
        # Some kernels write to the state that they are given.
        states = () if state is None else (tree_map(torch.clone, state),)
        cache = cache_type.from_legacy_cache(states, seen_tokens=_seen(state))
        y = self.layer(x.transpose(0, 1).contiguous(), past_key_values=cache, use_cache=True)[0]
        return y.transpose(0, 1), {name: value for name, value in cache[0].items() if value is not None}


def _seen(state: State) -> int:
    """Tokens in the cache of a layer with attention; others do not ask."""
    return state["attn_state"][0].shape[1] if state is not None and "attn_state" in state else 0


def _without(state: State, reset: Tensor) -> State:
    """The state with the rows at rest where ``reset`` (B,) is true."""
    if state is None:
        return None
    if "attn_state" in state:
        raise UsageError("resets inside a chunk cannot cut the cache of this layer of flash-linear-attention")
    assert all(len(leaf) == len(reset) for leaf in tree_leaves(state))
    return tree_map(lambda leaf: leaf.masked_fill(reset.view(-1, *[1] * (leaf.ndim - 1)), 0), state)

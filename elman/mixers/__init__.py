"""The variants, one file each, and the registry that names them.

To add one: write its file (config, module, counts). ``--model FILE`` takes that as it is; to ship it, add its line to
``_REGISTRY``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elman.errors import UsageError
from elman.mixers import own
from elman.mixers.base import Mixer, MixerConfig, State
from elman.options import flag

__all__ = [
    "PATTERNS",
    "Mixer",
    "MixerConfig",
    "Pattern",
    "State",
    "mixer_config",
    "mixer_names",
    "parse_pattern",
    "pattern_mixers",
]

_REGISTRY = {
    "e0": "elman.mixers.e0:E0Config",
    "e1": "elman.mixers.e1:E1Config",
    "e4": "elman.mixers.e4:E4Config",
    "e5": "elman.mixers.e5:E5Config",
    "e10": "elman.mixers.e10:E10Config",
    "e15": "elman.mixers.e15:E15Config",
    "matrix": "elman.mixers.matrix:MatrixConfig",
    **{f"ladder_{n}": f"elman.mixers.ladder:Ladder{n}Config" for n in range(7)},
    **{f"log_{n}": f"elman.mixers.log_ladder:Log{n}Config" for n in range(6)},
    "rnn": "elman.mixers.torch_rnn:RNNConfig",
    "gru": "elman.mixers.torch_rnn:GRUConfig",
    "lstm": "elman.mixers.torch_rnn:LSTMConfig",
    "mingru": "elman.mixers.min_rnn:MinGRUConfig",
    "minlstm": "elman.mixers.min_rnn:MinLSTMConfig",
    "mamba2": "elman.mixers.mamba2:Mamba2Config",
    "transformer": "elman.mixers.transformer:TransformerConfig",
    "mlp": "elman.mixers.mlp:MLPConfig",
}


@dataclass(frozen=True)
class Pattern:
    """Variants of successive layers, and what their options are where nothing is said of them."""

    layers: str
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"{flag(f'{name}.{key}')} {value}" for name, of in self.options.items() for key, value in of.items()]
        return " ".join((self.layers, *told))


#: Patterns with a name of their own. ``elman`` is what learns most of the strictly nonlinear ones: by docs/results, and
#: for bounds and the rate of W_h by sections 24 and 26 of benchmarks/NOTES.md.
PATTERNS = {
    "elman": Pattern("matrix,e1", {"matrix": {"conv": 4, "bound": 4.0}, "e1": {"bound": 4.0, "recurrent_lr": 0.1}})
}


def mixer_names() -> list[str]:
    """Every registered variant."""
    return list(_REGISTRY)


def mixer_config(name: str) -> type[MixerConfig]:
    """The config class of a registered variant, of ``fla:NAME``, or in a file. The file is imported only now.

    Raises:
        UsageError: no variant has this name; the nearest are named. Or its package is not installed, or its file is not
            that of a variant.
    """
    if own.is_file(name):
        return own.own_config(name, frozenset((*_REGISTRY, *PATTERNS)))
    if name.startswith("fla:"):
        from elman.mixers.fla import fla_config

        return fla_config(name)
    if name not in _REGISTRY:
        # A number that no E-variant has is likely to be meant as a rung of the older ladder.
        rung = f"ladder_{name[1:]}" if name[1:].isdigit() else name
        near = [rung] if rung in _REGISTRY else difflib.get_close_matches(name, _REGISTRY, n=3, cutoff=0.4)
        near = near or [*PATTERNS, *_REGISTRY]
        raise UsageError(
            f"--model {name!r} is unknown: did you mean {' or '.join(near)}? `elman models` lists every variant"
        )
    module, _, attribute = _REGISTRY[name].partition(":")
    config: type[MixerConfig] = getattr(importlib.import_module(module), attribute)
    assert config.name == name, (
        f"{attribute}.name is {config.name!r}, but _REGISTRY has it as {name!r}: give it one name"
    )
    return config


def parse_pattern(text: str) -> tuple[str, ...]:
    """``"e1"`` or ``"e1,e1,e0"``: the variants of successive layers, repeated over the depth.

    ``"1"`` means ``e1``, a name of ``PATTERNS`` what it stands for, and a file's path the variant in it.
    """
    return tuple(config.name for config in _pattern_configs(text))


def _pattern_configs(text: str) -> list[type[MixerConfig]]:
    names = [name.strip() for name in text.split(",")]
    names = [name if name.startswith("fla:") or own.is_file(name) else name.lower() for name in names]
    names = [each for name in names for each in (PATTERNS[name].layers.split(",") if name in PATTERNS else [name])]
    configs = [mixer_config(f"e{name}" if name.isdigit() else name) for name in names]
    by_name: dict[str, type[MixerConfig]] = {}
    for config in configs:
        if by_name.setdefault(config.name, config) is not config:
            raise UsageError(f"--model has two variants {config.name!r}, of two files: rename one")
    return configs


def pattern_mixers(text: str) -> tuple[MixerConfig, ...]:
    """The layers of ``parse_pattern`` with their options: the defaults, or what a name of ``PATTERNS`` gives."""
    options: dict[str, Any] = {}
    for name in text.split(","):
        pattern = PATTERNS.get(name.strip().lower())
        options |= pattern.options if pattern is not None else {}
    return tuple(config(**options.get(config.name, {})) for config in _pattern_configs(text))

"""The models that the benchmarks of whole models measure: every registered variant, by being registered, and more."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elman.errors import UsageError
from elman.mixers import PATTERNS, MixerConfig, mixer_names, pattern_mixers
from elman.model import ModelConfig
from elman.options import flag
from elman.sizing import size_model

#: Options beside the defaults that are worth a measurement of their own.
_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "e4": [{"expansion": 1.0}, {"expansion": 4.0}],
    "matrix": [{"key_size": 16, "value_size": 64}, {"key_size": 16}],
}
#: Who runs the steps changes no value: of interest to speed alone.
_KERNELS = ("rnn", "gru", "lstm")
#: As these are commonly shaped at 50M parameters, beside the depth that all others have.
_DEPTHS = {"mamba2": 12, "transformer": 10}
_HYBRIDS = ("e1,e1,mamba2", "e1,e1,transformer")
_FLA = ("fla:GatedDeltaNet", "fla:GLA", "fla:RWKV7")


@dataclass(frozen=True)
class Case:
    """A pattern of variants, the options of its only variant beside the defaults, and a depth of its own, if any."""

    pattern: str
    options: dict[str, Any] = field(default_factory=dict)
    depth: int | None = None

    @property
    def arguments(self) -> list[str]:
        """What the command line takes behind ``--model PATTERN``."""
        given = {**self.options, **({} if self.depth is None else {"depth": self.depth})}
        return [word for name, value in given.items() for word in (flag(name), str(value))]

    @property
    def label(self) -> str:
        return " ".join((self.pattern, *self.arguments))

    def mixers(self) -> tuple[MixerConfig, ...]:
        return tuple(replace(mixer, **self.options) for mixer in pattern_mixers(self.pattern))

    def size(self, params: int) -> ModelConfig:
        return size_model(self.mixers(), params=params, depth=self.depth)


def all_cases(speed: bool = True) -> list[Case]:
    """Every case; without ``speed``, only such as differ in what they compute."""
    cases = [Case(name, options) for name in mixer_names() for options in ({}, *_OPTIONS.get(name, []))]
    if speed:
        cases += [Case(name, {"kernels": "elman"}) for name in _KERNELS]
        cases += [Case(name, depth=depth) for name, depth in _DEPTHS.items()]
    cases += [Case(pattern) for pattern in (*PATTERNS, *_HYBRIDS)]
    if importlib.util.find_spec("fla") is not None:
        cases += [Case(pattern) for pattern in _FLA]
    # Without kernels of their own, these take longer than all others together.
    return sorted(cases, key=lambda case: case.pattern.startswith("log_"))


def choose_cases(names: Sequence[str], speed: bool = True) -> list[Case]:
    """All cases of these patterns, in the order given; a pattern without one is a case itself. No names: all cases.

    Raises:
        UsageError: no variant has such a name.
    """
    cases = all_cases(speed)
    if not names:
        return cases
    chosen = []
    for name in names:
        mixers = pattern_mixers(name)
        plain = ",".join(mixer.name for mixer in mixers)
        new = Case(plain if pattern_mixers(plain) == mixers else name)
        chosen += [case for case in cases if pattern_mixers(case.pattern) == mixers] or [new]
    return chosen


def first_line(error: Exception) -> str:
    """An error in a table's cell."""
    line = (str(error).strip().splitlines() or ["no message"])[0]
    return line if isinstance(error, UsageError) else f"{type(error).__name__}: {line}"

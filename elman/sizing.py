"""Parameters to width and depth and back; FLOPs and state sizes. Formulas only: no model is built."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from elman.errors import UsageError
from elman.mixers import MixerConfig
from elman.model import MAX_DEPTH, MAX_DIM, ModelConfig
from elman.units import format_count

#: How far the counted parameters may lie from the ones asked for.
TOLERANCE = 0.02
#: Widths are multiples of the first of these that meets the tolerance; wide multiples suit the hardware better.
_GRANULARITY = (64, 32, 16, 8, 4, 2, 1)
_DEFAULT_DEPTH = 6


class SizeError(UsageError):
    """No width or depth comes within the tolerance of the parameters asked for."""


def num_params(config: ModelConfig) -> int:
    """Learned numbers of the model, the tied head counted once."""
    mixers = sum(mixer.num_params(config.dim) for mixer in config.layers())
    norms = (config.depth + 1) * config.dim
    return config.vocab_size * config.dim + mixers + norms


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward FLOPs a token: 2 a multiply-add of every matrix product, the head's too. Training costs 3 times that."""
    mixers = sum(mixer.flops_per_token(config.dim, seq_len) for mixer in config.layers())
    return mixers + 2 * config.dim * config.vocab_size


def state_size(config: ModelConfig, seq_len: int) -> int:
    """Numbers carried a sequence from one token to the next. ``seq_len`` matters for attention only."""
    return sum(mixer.state_size(config.dim, seq_len) for mixer in config.layers())


def size_model(
    mixers: tuple[MixerConfig, ...],
    *,
    params: int | None = None,
    dim: int | None = None,
    depth: int | None = None,
    vocab_size: int = 256,
) -> ModelConfig:
    """The model that the given sizes ask for.

    With ``params``, the missing one of width and depth is solved for (depth defaults to 6); without it, both sizes
    are taken as they are. Whatever is given, the counted parameters lie within 2% of ``params`` or it is an error.

    Raises:
        UsageError: nothing to go by, or no size within the tolerance; the nearest ones are named.
    """
    if params is None and dim is None:
        raise UsageError("no size was given: give --params, such as --params 10m, or --dim")
    config = ModelConfig(
        dim if dim is not None else 64, depth if depth is not None else _DEFAULT_DEPTH, mixers, vocab_size
    )
    if params is not None and dim is None:
        config = _solve_dim(config, params)
    elif params is not None and depth is None:
        config = _solve_depth(config, params)
    elif params is not None and not _near(config, params):
        raise _off_target([config], params, "drop one of --params, --dim and --depth")
    if config.depth < len(mixers):
        raise UsageError(
            f"--model {config.pattern} is a pattern of {len(mixers)} layers, but the depth is {config.depth}: "
            f"give a --depth of at least {len(mixers)}"
        )
    return config


def _near(config: ModelConfig, params: int) -> bool:
    return abs(num_params(config) - params) <= TOLERANCE * params


def _solve_dim(config: ModelConfig, params: int) -> ModelConfig:
    nearest: list[ModelConfig] = []
    candidates = [config]
    for candidate in candidates:
        for granularity in _GRANULARITY:
            found = _nearest(partial(_with_width, candidate, granularity), MAX_DIM // granularity, params)
            if _near(found[0], params):
                return found[0]
        nearest = nearest or found
        if candidate is config:
            pinned = (replace(config, mixers=tuple(mixer.pinned(one.dim) for mixer in config.mixers)) for one in found)
            candidates += [one for one in pinned if one != config]
    raise _off_target(nearest, params, "give another --params or --depth, or the width itself by --dim")


def _solve_depth(config: ModelConfig, params: int) -> ModelConfig:
    nearest = _nearest(lambda n: replace(config, depth=n), MAX_DEPTH, params)
    if _near(nearest[0], params):
        return nearest[0]
    raise _off_target(nearest, params, "give another --params or --dim")


def _with_width(config: ModelConfig, granularity: int, n: int) -> ModelConfig:
    return replace(config, dim=n * granularity)


def _nearest(make: Callable[[int], ModelConfig], upper: int, params: int) -> list[ModelConfig]:
    """The one or two of ``make(1 ... upper)`` around the target, the nearer first. More n is more parameters."""
    # Doubling first: a layer of another package is counted by making it, which takes long where it is very wide.
    above = 1
    while above < upper and num_params(make(above)) <= params:
        above = min(2 * above, upper)
    above = bisect.bisect_right(range(1, above), params, key=lambda n: num_params(make(n))) + 1
    around = [make(n) for n in (above - 1, above) if n > 0]
    return sorted(around, key=lambda config: abs(num_params(config) - params))


def _off_target(nearest: list[ModelConfig], params: int, cure: str) -> SizeError:
    options = " and ".join(f"{format_count(num_params(c))} (--dim {c.dim} --depth {c.depth})" for c in nearest)
    return SizeError(
        f"--params {format_count(params)} cannot be met within {TOLERANCE:.0%}: the nearest is {options}; {cure}"
    )

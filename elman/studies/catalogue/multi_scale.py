"""Four sizes, at a fixed depth and at one that grows with the size."""

import bisect

from elman.mixers import mixer_config
from elman.sizing import size_model
from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults
from elman.units import parse_count

#: The rule: width over depth, as in common Transformers.
_ASPECT = 64


def depth_by_rule(model: str, params: str) -> int:
    """The least depth whose width is at most 64 times it."""
    mixers = (mixer_config(model)(),)

    def is_deep(depth: int) -> bool:
        return size_model(mixers, params=parse_count(params, "params"), depth=depth).dim <= _ASPECT * depth

    # The deeper, the narrower.
    return bisect.bisect_left(range(100), True, lo=2, key=is_deep)


def study(scale: Scale) -> Study:
    runs = []
    for params in scale(("50m", "100m", "200m", "400m"), ("150k", "300k", "600k")):
        flat = scale(6, 2)
        runs.append(Run(f"E1 depth {flat} {params}", "e1", params=params, depth=flat, series=f"E1 depth {flat}"))
        for name, model in (("E1", "e1"), ("Mamba2", "mamba2"), ("Transformer", "transformer")):
            depth = depth_by_rule(model, params) if scale.name == "full" else flat + 1
            runs.append(Run(f"{name} by rule {params}", model, params=params, depth=depth, series=f"{name} by rule"))
    return Study(
        name="multi_scale",
        question="How does the loss of each fall with its size, and does depth that grows with the size matter?",
        runs=tuple(runs),
        varies=("params",),
        axis="params",
        notes=(
            f"Depth by rule: the least whose width is at most {_ASPECT} times it (at the tiny scale, 3).",
            "The batch is one with which the largest fit into 80 GB.",
        ),
        **defaults(scale, params=None, train={"batch_size": scale(64, 16)}),
    )

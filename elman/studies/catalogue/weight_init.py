"""How matrices start, for an Elman network and for its rivals."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    models = (
        ("elman", "elman", scale(6, 2)),
        ("E1", "e1", scale(6, 2)),
        ("Mamba2", "mamba2", scale(12, 2)),
        ("Transformer", "transformer", scale(10, 2)),
    )
    return Study(
        name="weight_init",
        question="Do matrices learn more that start by their inputs, or as 0 where they write to the residual stream?",
        runs=tuple(
            Run(f"{name}, {told}", model, depth=depth, train={"weight_init": told})
            for name, model, depth in models
            for told in ("normal", "fan_in", "zero_out")
        ),
        varies=("weight_init",),
        notes=(
            "normal: N(0, 0.02²).",
            "fan_in: N(0, 1 / inputs), but what writes to the residual stream as before; zero_out: this 0.",
        ),
        **defaults(scale),
    )

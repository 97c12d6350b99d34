"""The older ladder: each rung adds one idea to the one before."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults

_RUNGS = ("stock", "gated", "selective", "diagonal", "full", "triple R", "polynomial")


def study(scale: Scale) -> Study:
    return Study(
        name="ablation",
        question="Which rung of the older ladder is worth its cost?",
        runs=tuple(Run(f"{n} {name}", f"ladder_{n}", depth=scale(6, 2)) for n, name in enumerate(_RUNGS)),
        **defaults(scale),
    )

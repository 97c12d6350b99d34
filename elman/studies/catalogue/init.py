"""How W_h starts."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    return Study(
        name="init",
        question="How much of E1's loss is where W_h started?",
        runs=tuple(
            Run(name, "e1", {"init": name}, depth=scale(6, 2))
            for name in ("orthogonal", "identity", "xavier", "normal")
        ),
        **defaults(scale),
    )

"""Wide and shallow, or narrow and deep, at 50 million parameters."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    return Study(
        name="width_depth",
        question="At 50 million parameters, shall E1 be wide and shallow, or narrow and deep?",
        runs=tuple(
            Run(f"depth {depth}", "e1", depth=depth, series="E1") for depth in scale((3, 6, 10, 16, 24), (1, 2, 4))
        ),
        axis="depth",
        **defaults(scale),
    )

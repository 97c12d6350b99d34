"""One size, six depths."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    return Study(
        name="depth_sweep",
        question="At 400 million parameters, which depth of E1 learns most?",
        runs=tuple(
            Run(f"depth {depth}", "e1", depth=depth, series="E1") for depth in scale((6, 12, 18, 22, 26, 32), (1, 2, 4))
        ),
        axis="depth",
        **defaults(scale, params=scale("400m", "200k"), train={"batch_size": scale(64, 16)}),
    )

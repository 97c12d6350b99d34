"""The Elman family and its rivals at 50 million parameters."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    return Study(
        name="ladder_50m",
        question="Which learns most in the same time at 50M parameters: an Elman network, Mamba2 or a Transformer?",
        runs=(
            Run("E1 wide", "e1", depth=scale(6, 2)),
            Run("E1 wide, tamed", "e1", {"bound": 4.0, "recurrent_lr": 0.1}, depth=scale(6, 2)),
            Run("E1 deep", "e1", depth=scale(10, 4)),
            Run("E10", "e10", depth=scale(6, 2)),
            Run("Matrix", "matrix", depth=scale(6, 2)),
            Run("Matrix and E1", "matrix,e1", depth=scale(6, 2)),
            Run("Matrix, half, and E1", "matrix,e1", {"matrix.expansion": 0.5}, depth=scale(6, 2)),
            Run("Matrix, convolved, and E1", "matrix,e1", {"matrix.conv": 4}, depth=scale(6, 2)),
            Run("elman", "elman", depth=scale(6, 2)),
            Run("E5", "e5", {"rank": scale(270, 16)}, dim=scale(1536, None), depth=scale(None, 4)),
            Run("Mamba2", "mamba2", depth=scale(12, 2)),
            Run("Transformer", "transformer", depth=scale(10, 2)),
        ),
        notes=scale(
            (
                "E1 wide is 1280 × 6. E1 deep is 992 × 10: at 1024 × 10 it would have 52.7M parameters, 5% too many.",
                "E1 tamed: tanh bends at 4, and W_h takes a tenth of the learning rate, as in elman's layers of E1.",
                "E5 is 1536 × 20 of rank 270.",
            ),
            (),
        ),
        **defaults(scale),
    )

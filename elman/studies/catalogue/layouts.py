"""A matrix state beside E1, E10 or no state: in which order, how many layers, and how large a state?"""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    half, quarter = {"matrix.expansion": 0.5}, {"matrix.expansion": 0.25}
    depth = scale(6, 2)
    return Study(
        name="layouts",
        question="Which layout of layers with matrix and vector states learns most in the same time at 50M parameters?",
        runs=(
            Run("matrix,e1", "matrix,e1", depth=depth),
            Run("matrix,e1, half the state", "matrix,e1", half, depth=depth),
            Run("matrix,e1, a quarter of it", "matrix,e1", quarter, depth=depth),
            Run("matrix,e1, half, β < 2", "matrix,e1", {**half, "matrix.beta_max": 2.0}, depth=depth),
            Run("matrix,e1, half, 4 layers", "matrix,e1", half, depth=scale(4, 4)),
            Run("matrix,e1, half, 8 layers", "matrix,e1", half, depth=scale(8, 6)),
            Run("e1,matrix, half", "e1,matrix", half, depth=depth),
            Run("matrix,e1,e1, half", "matrix,e1,e1", half, depth=scale(6, 3)),
            Run("matrix,e10, half", "matrix,e10", half, depth=depth),
            Run("matrix,e1, convolved", "matrix,e1", {"matrix.conv": 4}, depth=depth),
            Run("matrix,e15, convolved", "matrix,e15", {"matrix.conv": 4}, depth=depth),
            Run("matrix,e1, both convolved", "matrix,e1", {"matrix.conv": 4, "e1.conv": 4}, depth=depth),
            Run("matrix,mlp, convolved", "matrix,mlp", {"matrix.conv": 4, "mlp.hidden": 5 / 3}, depth=depth),
            Run("E10,mlp", "e10,mlp", {"mlp.hidden": 5 / 3}, depth=depth),
            Run("matrix", "matrix", depth=depth),
            Run("E1", "e1", depth=depth),
            Run("E10", "e10", depth=depth),
        ),
        notes=(
            "--expansion of the layers with a matrix state is 1 where nothing is said of it.",
            "A layer of mlp has no state, and as many weights as one of E1.",
        ),
        **defaults(scale),
    )

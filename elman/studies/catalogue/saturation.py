"""How far the units of a nonlinear recurrence reach into what its cell bends, and how fast its matrix may move."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    rates = (1.0, 0.1)
    models = (("e1", "E1", (1, 4, 16)), ("e10", "E10", (1, 4, 16)), ("matrix,e1", "elman", (1, 4)))
    convolved = {"matrix.conv": 4, "matrix.bound": 4.0}
    return Study(
        name="saturation",
        question="Does a nonlinear RNN learn more if its cell bends later, or if W_h moves more slowly?",
        runs=tuple(
            Run(
                f"{name}, bound {bound}, W_h × {rate:g}",
                model,
                {**convolved, "e1.bound": float(bound)} if "," in model else {"bound": float(bound)},
                depth=scale(6, 2),
                train={"recurrent_lr": rate},
            )
            for model, name, bounds in models
            for bound in bounds
            for rate in rates
        ),
        varies=("recurrent_lr",),
        notes=(
            "bound R: h = R tanh((W_h h + W_x u + b) / R), in elman of its layers of E1, whose others have 4.",
            "W_h ×: its learning rate, as a multiple of the other weights'.",
        ),
        **defaults(scale),
    )

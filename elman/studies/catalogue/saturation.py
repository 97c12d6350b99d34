"""How far the units of a nonlinear recurrence reach into what its cell bends, and how fast its matrix may move."""

from typing import Any

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    convolved = {"matrix.conv": 4, "matrix.bound": 4.0}
    models: tuple[tuple[str, str, str, dict[str, Any], tuple[float, ...]], ...] = (
        ("e1", "E1", "", {}, (1.0, 4.0, 16.0)),
        ("e10", "E10", "", {}, (1.0, 4.0, 16.0)),
        ("matrix,e1", "elman", "e1.", convolved, (1.0, 4.0)),
    )
    return Study(
        name="saturation",
        question="Does a nonlinear RNN learn more if its cell bends later, or if W_h moves more slowly?",
        runs=tuple(
            Run(
                f"{name}, bound {bound:g}, W_h × {rate:g}",
                model,
                {**options, f"{layer}bound": bound, f"{layer}recurrent_lr": rate},
                depth=scale(6, 2),
            )
            for model, name, layer, options, bounds in models
            for bound in bounds
            for rate in (1.0, 0.3, 0.1, 0.03)
        ),
        notes=(
            "bound R: h = R tanh((W_h h + W_x u + b) / R), in elman of its layers of E1, whose others have 4.",
            "W_h ×: its learning rate, as a multiple of the other weights'.",
        ),
        **defaults(scale),
    )

"""Products in 8 bits and in 16: what the speed is worth, and what it costs."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    models = (("E1", "e1", scale(6, 2)), ("Matrix and E1", "matrix,e1", scale(6, 2)))
    # What a CPU can do stands in at the tiny scale.
    precisions = scale(("bf16", "fp8"), ("fp32", "bf16"))
    return Study(
        name="precision",
        question="Does a model learn more in the same time with its large products in 8 bits?",
        runs=tuple(
            Run(f"{name}, {precision}", model, depth=depth, train={"precision": precision})
            for name, model, depth in models
            for precision in precisions
        ),
        varies=("precision",),
        notes=("fp8 is that of torchao; recurrences, norms and the head stay as they are.",),
        **defaults(scale),
    )

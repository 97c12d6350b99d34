"""The batch, which published tables mixed: how it moves speed and loss."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    models = (
        ("E1", "e1", scale(6, 2)),
        ("Mamba2", "mamba2", scale(12, 2)),
        ("Transformer", "transformer", scale(10, 2)),
    )
    return Study(
        name="batch_size",
        question="How do speed and loss depend on the batch, and does it move the ranking of the models?",
        runs=tuple(
            Run(f"{name} batch {size}", model, depth=depth, train={"batch_size": size}, series=name)
            for name, model, depth in models
            for size in scale((32, 64, 128, 256), (4, 16))
        ),
        varies=("batch_size",),
        axis="batch_size",
        **defaults(scale),
    )

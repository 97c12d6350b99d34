"""Three optimisers, each offered to an Elman network, to Mamba2 and to a Transformer."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    models = (
        ("elman", "elman", scale(6, 2)),
        ("Mamba2", "mamba2", scale(12, 2)),
        ("Transformer", "transformer", scale(10, 2)),
    )
    return Study(
        name="optimizers",
        question="Does another optimiser than AdamW learn more in the same time, and does it move the ranking?",
        runs=tuple(
            Run(f"{name}, {told}", model, depth=depth, train={"optimizer": optimizer})
            for name, model, depth in models
            for told, optimizer in (("AdamW", "adamw"), ("schedule-free", "schedulefree"), ("Muon", "muon"))
        ),
        varies=("optimizer", "schedule"),
        notes=("Muon takes the matrices, at AdamW's learning rates by its rule of matched sizes; AdamW the rest.",),
        **defaults(scale),
    )

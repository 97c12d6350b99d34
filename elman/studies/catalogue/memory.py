"""Equal memory: each model takes the largest batch that fits."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    return Study(
        name="memory",
        question="Which learns most where memory, not the batch, is what all have the same of?",
        runs=(
            Run("E1", "e1", depth=scale(6, 2)),
            Run("E10", "e10", depth=scale(6, 2)),
            Run("Mamba2", "mamba2", depth=scale(12, 2)),
            Run("Transformer", "transformer", depth=scale(10, 2)),
        ),
        memory=scale(24 * 2**30, 64 * 2**20),
        varies=("batch_size",),
        **defaults(scale),
    )

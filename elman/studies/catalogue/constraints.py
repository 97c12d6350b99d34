"""What holds W_h."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    depth = scale(6, 2)
    return Study(
        name="constraints",
        question="Does E1 need a bound on W_h, and what does each cost?",
        runs=(
            Run("free", "e1", depth=depth),
            Run("spectral norm, cap", "e1", {"constraint": "spectral_norm"}, depth=depth),
            Run(
                "spectral norm, rescale", "e1", {"constraint": "spectral_norm", "spectral_mode": "rescale"}, depth=depth
            ),
            Run("scaled orthogonal", "e1", {"constraint": "scaled_orthogonal"}, depth=depth),
        ),
        **defaults(scale),
    )

"""E1's tanh against E15's softsign."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    return Study(
        name="activation",
        question="Does softsign, which saturates more slowly, learn more than tanh?",
        runs=(
            Run("tanh", "e1", depth=scale(6, 2)),
            Run("softsign", "e15", depth=scale(6, 2)),
        ),
        **defaults(scale),
    )

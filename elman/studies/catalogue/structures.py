"""The form of W_h."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults

_STRUCTURES = (
    "dense", "block_diagonal", "diagonal", "low_rank", "monarch", "sparse_low_rank", "random_projection",
)  # fmt: skip


def study(scale: Scale) -> Study:
    return Study(
        name="structures",
        question="At equal parameters, which form of W_h learns most: few units seeing all others, or many seeing few?",
        runs=tuple(
            Run(
                name.replace("_", " "),
                "e1",
                {"structure": name, **({"heads": scale(8, 4)} if name == "block_diagonal" else {})},
                depth=scale(6, 2),
            )
            for name in _STRUCTURES
        ),
        **defaults(scale),
    )

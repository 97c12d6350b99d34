"""What a head's matrix state is: its size, its bound, and what a step does with it."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    kinds: tuple[tuple[str, dict[str, object]], ...] = (
        ("32 × 32", {}),
        ("32 × 32, bound 1", {"bound": 1.0}),
        ("32 × 32, bound 2", {"bound": 2.0}),
        ("32 × 32, bound 8", {"bound": 8.0}),
        ("16 × 32", {"key_size": 16}),
        ("16 × 64", {"key_size": 16, "value_size": 64}),
        ("32 × 64", {"value_size": 64}),
        ("64 × 64", {"key_size": 64, "value_size": 64}),
        ("a decay of each row", {"decay": "key"}),
        ("no decay", {"decay": "none"}),
        ("no β", {"beta": "none"}),
        ("β < 2", {"beta_max": 2.0}),
        ("softsign", {"cell": "softsign"}),
        ("identity, which is linear", {"cell": "identity"}),
    )
    return Study(
        name="matrix_state",
        question="Which size and bound of a head's matrix, decay, β and cell learn most in the same time, beside E1?",
        runs=tuple(
            Run(name, "elman", {f"matrix.{key}": value for key, value in options.items()}, depth=scale(6, 2))
            for name, options in kinds
        ),
        notes=(
            "K × V: rows, read and written by key, and columns; as many heads as make N · V the model's width.",
            "Where nothing is said of it: 32 × 32, bound 4, a decay and a β of each head, by the input, and tanh.",
        ),
        **defaults(scale),
    )

"""More units for the same weights: W_h of low rank, with and without a bound on its largest singular value."""

from elman.studies import Run, Scale, Study
from elman.studies.defaults import defaults


def study(scale: Scale) -> Study:
    depth = scale(6, 2)
    runs = [Run("E1", "e1", depth=depth)]
    for expansion in (1.0, 2.0, 4.0):
        name, options = f"E4 {expansion:g}×", {"expansion": expansion}
        runs.append(Run(name, "e4", options, depth=depth))
        runs.append(Run(f"{name} spectral", "e4", {**options, "constraint": "spectral_norm"}, depth=depth))
    steps = scale(2000, 200)
    batch_size, seq_len = scale(128, 16), scale(512, 64)
    return Study(
        name="low_rank",
        question="Do more units behind a W_h of low rank learn more than few with a dense one, and is a bound needed?",
        runs=tuple(runs),
        budget="tokens",
        notes=(f"Equal tokens are {steps:,} steps.",),
        **defaults(scale, tokens=steps * batch_size * seq_len, train={"batch_size": batch_size, "seq_len": seq_len}),
    )

"""What the catalogue's studies have in common, said once."""

from __future__ import annotations

from typing import Any

from elman.studies.study import Scale


def defaults(scale: Scale, **more: Any) -> dict[str, Any]:
    """Arguments of ``Study``: 50M parameters and ten minutes a run; at the tiny scale 200 thousand and eight seconds.

    ``train`` is added to the options that all share; anything else in ``more`` takes the place of what is here.
    """
    train = {
        "batch_size": scale(128, 16), "seq_len": scale(512, 64), "eval_bytes": scale("5m", "50k"),
        **more.pop("train", {}),
    }  # fmt: skip
    return {
        "params": scale("50m", "200k"),
        "time_limit": scale("10m", "8s"),
        "tokens": scale(250e6, 300e3),
        "flops": scale(7.5e16, 3.6e11),
        "seeds": scale((0, 1, 2), (0, 1)),
        "learning_rates": scale((1e-3, 2e-3, 4e-3), (1e-3, 3e-3)),
        "sweep_part": scale(1.0, 0.25),
        "train": train,
        **more,
    }

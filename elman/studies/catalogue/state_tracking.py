"""What a state can follow: every model with every synthetic task, at the length it was trained at and far past it."""

from elman.evaluation.tasks import task_names
from elman.studies import Run, Scale, Study, over_tasks


def study(scale: Scale) -> Study:
    models = (
        Run("E0", "e0", depth=2),
        Run("E1", "e1", depth=2),
        Run("E5", "e5", {"rank": scale(32, 8)}, depth=2),
        Run("E10", "e10", depth=2),
        Run("E15", "e15", depth=2),
        Run("Matrix", "matrix", depth=2),
        Run("Matrix, β < 2", "matrix", {"beta_max": 2.0}, depth=2),
        Run("Matrix and E1", "elman", depth=2),
        Run("Ladder 1, δ-gate", "ladder_1", depth=2),
        Run("Ladder 3, diagonal", "ladder_3", depth=2),
        Run("Ladder 5, triple R", "ladder_5", depth=2),
        Run("GRU", "gru", depth=2),
        Run("LSTM", "lstm", depth=2),
        Run("minGRU", "mingru", depth=2),
        # Speed is not asked for, and so small a model needs no kernels of its own.
        Run("Mamba2", "mamba2", {"kernels": "torch", "d_state": scale(32, 8), "headdim": scale(32, 8)}, depth=2),
        Run("Transformer", "transformer", {"head_dim": scale(32, 8)}, depth=2),
    )
    tiny = ("E1", "Ladder 3, diagonal", "GRU", "minGRU", "Transformer")
    tasks = scale(tuple(task_names()), ("parity", "mod_3", "s3", "dyck_1", "anbncn", "mqar"))
    steps, batch_size, seq_len = scale(2000, 150), scale(64, 16), scale(40, 16)
    return Study(
        name="state_tracking",
        question="Which state can a model follow, and does what it learned hold at ten times the length?",
        runs=over_tasks((run for run in models if scale.name == "full" or run.name in tiny), tasks),
        params=scale("200k", "60k"),
        budget="tokens",
        tokens=steps * batch_size * seq_len,
        time_limit=scale("5s", "2s"),
        flops=scale(2e12, 1e10),
        seeds=scale((0, 1, 2), (0, 1)),
        learning_rates=(3e-3,),
        varies=("task",),
        train={"batch_size": batch_size, "seq_len": seq_len, "warmup": scale(100, 10), "weight_decay": 0.01},
        notes=(
            f"Equal tokens are {steps:,} steps. All models have two layers.",
            "One learning rate for all: --learning-rates 1e-3 3e-3 1e-2 has each choose its own.",
        ),
    )

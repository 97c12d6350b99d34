"""Run folders as a study leaves them, made without training."""

import json
import math
from pathlib import Path
from typing import Any

from elman.evaluation.heldout import HeldoutLoss
from elman.evaluation.long_text import ContextLoss
from elman.evaluation.report import Evaluation
from elman.mixers import mixer_config
from elman.sizing import flops_per_token, num_params, size_model
from elman.studies.plan import seal, settings
from elman.training.config import TrainConfig
from elman.training.run import RunFolder

FACTS: dict[str, Any] = {
    "study": "toy", "scale": "full", "question": "Which is it?", "held_equal": ["batch: 4 windows a step"],
    "varies": [],
    "axis": None, "notes": [], "memory": None, "budget": {"kind": "tokens", "amount": 12_800}, "seeds": [0, 1, 2],
    "learning_rates": [1e-3], "sweep_part": 1.0, "planned": ["a", "b"], "refused": {}, "fingerprint": "text",
    "role": "final", "series": "s", "target_params": None,
}  # fmt: skip
SESSION: dict[str, Any] = {
    "time": "2026-01-01T00:00:00+00:00", "from_step": 0, "precision": "bf16", "compiled": True, "captured": False,
    "processes": 1, "parallel": "none", "start_up_seconds": 7.0, "backends": ["persistent"], "device": "cuda",
    "gpu": "NVIDIA H100 80GB HBM3", "packages": {"torch": "2.13.0"}, "git_commit": "abc",
}  # fmt: skip


def make_run(
    path: Path,
    label: str | None = "a",
    *,
    seed: int = 0,
    heldout: float = 2.0,
    steps: int = 200,
    speed: float = 1000.0,
    lr: float = 1e-3,
    dim: int = 16,
    session: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **facts: Any,
) -> RunFolder:
    """A whole run whose files agree; ``label`` None makes one that is of no study."""
    model = size_model((mixer_config("e1")(),), dim=dim, depth=2)
    config = TrainConfig(
        dim=dim,
        depth=2,
        batch_size=4,
        steps=steps,
        seed=seed,
        lr=lr,
        **{"data": Path("/text"), "seq_len": 16, "warmup": steps // 10, **(train or {})},
    )
    run = RunFolder(path)
    path.mkdir(parents=True)
    told = {**FACTS, **facts, "run": label, "identity": "0", "settings": settings(config, model)}
    told["seal"] = seal(told)
    if label is not None:
        run.write_json("study.json", told)
    run.write_config(config, model)
    run.write_json("env.json", [{**SESSION, **(session or {})}])
    tokens = config.batch_size * config.seq_len
    losses = [heldout + 3 * math.exp(-i / 40) for i in range(steps)]
    run.append_metrics(
        [
            {"step": i + 1, "lr": lr, "seconds": (i + 1) * tokens / speed, "loss": loss, "grad_norm": 1.0}
            for i, loss in enumerate(losses)
        ]
    )
    bits = heldout / math.log(2)
    seconds = steps * tokens / speed
    run.append_metrics([{"step": steps, "seconds": seconds, "heldout_loss": heldout, "heldout_bits_per_byte": bits}])
    run.write_json(
        "summary.json",
        {
            "model": "e1", "params": num_params(model), "dim": dim, "depth": 2,
            "flops_per_token": flops_per_token(model, config.seq_len), "state_size": 32, "seq_len": config.seq_len,
            "batch_size": 4, "processes": 1, "parallel": "none",
            "steps": steps, "tokens": steps * tokens, "compiled": True, "start_up_seconds": 7.0,
            "train_seconds": seconds, "tokens_per_second": speed, "mfu": 0.25, "peak_memory_bytes": 2**30,
            "skipped_steps": 0, "last_100_loss": sum(losses[-100:]) / len(losses[-100:]), "unit": "byte",
            "heldout": {"nats_per_token": heldout, "tokens": 100, "bytes": 100, "nats_per_byte": heldout,
                        "bits_per_byte": bits},
        },
    )  # fmt: skip
    return run


def change(run: RunFolder, name: str, **values: Any) -> None:
    """Edit a JSON file by hand; a value of ``...`` takes the key away."""
    found = run.read_json(name)
    target = found[0] if isinstance(found, list) else found
    for key, value in values.items():
        if value is ...:
            del target[key]
        else:
            target[key] = value
    run.write_json(name, found)


def diverge(run: RunFolder, steps: int = 10) -> None:
    """As one that ended in so many steps whose loss was no number; by 10 of them a run ends."""
    (run.path / "summary.json").unlink(missing_ok=True)
    last = max(row["step"] for row in run.read_metrics())
    run.append_metrics([{"step": last + i, "lr": 1e-3, "seconds": 13.0, "skipped": i} for i in range(1, steps + 1)])


def make_study(folder: Path, heldout: dict[str, list[float]], **more: Any) -> Path:
    """A study's folder: for each run, the held-out loss of each seed."""
    for label, losses in heldout.items():
        for seed, loss in enumerate(losses):
            make_run(folder / "runs" / f"{label}-seed{seed}", label, seed=seed, heldout=loss, **more)
    return folder


def make_evaluation(
    run: RunFolder, contexts: dict[int, float], stamp: str = "20260101-000000", file: str = "/some/text", **more: Any
) -> Path:
    """What ``elman eval`` leaves in a run's folder, but for what is only for people; the file's path."""
    loss = HeldoutLoss(1.5, 100, 100)
    found = Evaluation(
        run={"model": "e1", "params": 1000, "seq_len": 16, "checkpoint": "step-00000200"},
        data={"file": file, "bytes": 5000, "tokens": 5000},
        unit="byte",
        environment={"command": ["/bin/elman", "eval", str(run.path)]},
        contexts=[ContextLoss(length, 512, nats, nats, 0.01) for length, nats in contexts.items()],
        **{"windows": loss, "carried": loss, **more},
    )
    path = run.path / f"eval-{stamp}" / "eval.json"
    path.parent.mkdir()
    path.write_text(json.dumps(found.to_dict()))
    return path

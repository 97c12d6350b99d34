"""How fast is a whole training step, plain and compiled, and where does its time go?

    python -m benchmarks.training [--profile] [--commit HASH]

Takes the steps that ``elman train`` takes (batch, both passes, clipping, AdamW) on Python's own sources, with each
setting of ``--compile`` twice in one process. A step's time is that between two CUDA events, the host being free to
run ahead, and the median of ``--steps`` of them after ten that do not count. Needs a GPU. What it prints goes to
benchmarks/results/ too.
"""

from __future__ import annotations

import gc
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.steps import device_slug, step_times
from elman.mixers import mixer_config, parse_pattern
from elman.model import ModelConfig
from elman.sizing import size_model
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.profile import profile_steps
from elman.training.start import demo_data, model_line

RESULTS = Path(__file__).parent / "results"
_WARM_UP_STEPS = 10
#: A GPU slows as it warms: in this order it slows both alike.
SETTINGS = ("off", "on", "on", "off")


@dataclass
class Row:
    """One setting. Start-up is what comes before the first step: compiling, or loading kernels."""

    compile: str
    ms_per_step: float
    tokens_per_second: float
    peak_gib: float
    start_up_seconds: float
    kernels: list[dict[str, Any]] = field(default_factory=list)


def measure(config: TrainConfig, model: ModelConfig, console: Console, steps: int, profile: bool) -> Row:
    """Train for a while."""
    trainer = Trainer(config, model, console)
    trainer.warm_up()
    step_times(trainer, _WARM_UP_STEPS)
    torch.cuda.reset_peak_memory_stats()
    ms = statistics.median(step_times(trainer, steps))
    return Row(
        compile=config.compile,
        ms_per_step=ms,
        tokens_per_second=config.batch_size * config.seq_len / ms * 1e3,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
        start_up_seconds=trainer.start_up_seconds,
        kernels=profile_steps(trainer._train_step, trainer.device, 1).kernels if profile else [],
    )


def main(
    model: str = "e1",
    params: str = "50m",
    depth: int | None = None,
    seq_len: int = 512,
    batch_size: int = 256,
    steps: int = 30,
    profile: bool = False,
    commit: str | None = None,
    out: Path = RESULTS,
) -> None:
    """Measure, print and write. ``commit`` is for sources that are no git checkout."""
    console = Console()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    mixers = tuple(mixer_config(name)() for name in parse_pattern(model))
    rows: list[Row] = []
    for setting in SETTINGS:
        config = TrainConfig(
            model=model, params=params, depth=depth, seq_len=seq_len, batch_size=batch_size, steps=10**6,
            data=demo_data(console), device="cuda", compile=setting,
        )  # fmt: skip
        model_config = size_model(mixers, params=config.param_count, depth=depth)
        rows.append(measure(config, model_config, console, steps, profile and len(rows) < 2))
        gc.collect()
        torch.cuda.empty_cache()
    for row in rows:
        if row.kernels:
            console.print(kernel_table(row))
    console.print(model_line(model_config, seq_len), soft_wrap=True)
    table = Table("--compile", "ms a step", "tokens/s", "peak, GiB", "start-up, s")
    for row in rows:
        table.add_row(
            row.compile,
            f"{row.ms_per_step:.2f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.peak_gib:.2f}",
            f"{row.start_up_seconds:.1f}",
        )
    console.print(table)
    result = {
        "machine": machine(torch.device("cuda"), commit),
        "model": model_config.to_dict(),
        "seq_len": seq_len,
        "batch_size": batch_size,
        "steps": steps,
        "rows": [asdict(row) for row in rows],
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"training-{device_slug(torch.device('cuda'))}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {path.name}")


def kernel_table(row: Row, most: int = 25) -> Table:
    """The longest kernels of a step."""
    total = sum(kernel["ms"] for kernel in row.kernels)
    table = Table("ms", "calls", "kernel", title=f"--compile {row.compile}: {total:.1f} ms on the GPU a step")
    for kernel in row.kernels[:most]:
        table.add_row(f"{kernel['ms']:.2f}", str(kernel["calls"]), kernel["name"])
    return table


if __name__ == "__main__":
    tyro.cli(main)

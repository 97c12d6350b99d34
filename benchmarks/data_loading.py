"""What share of a training step is data loading, and what does `import elman` cost?

    python -m benchmarks.data_loading [--out benchmarks/results/data_loading.json] [--commit HASH]

Times, in one run: drawing a batch from a file of real text (warm page cache) and a whole training step of the demo's
model, on the CPU and, where there is one, on the GPU; and fresh interpreters that import torch with and without elman.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from elman.environment import resolve_device
from elman.mixers import mixer_config
from elman.sizing import size_model
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.start import demo_data


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median over ``repeats`` calls, after three that do not count."""
    seconds = []
    for i in range(repeats + 3):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= 3:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def import_seconds(code: str) -> float:
    """Of a fresh interpreter."""
    return median_seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True), 5)


def main(steps: int = 30, out: Path | None = None, commit: str | None = None) -> None:
    """Measure and print; write JSON too if ``out`` is given. ``commit`` is for sources that are no git checkout."""
    console = Console()
    config = TrainConfig(data=demo_data(console), params="1m", depth=2, seq_len=128, batch_size=32, steps=10**6)
    model = size_model((mixer_config("e1")(),), params=config.param_count, depth=config.depth)
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        trainer = Trainer(dataclasses.replace(config, device=device), model, console)
        trainer.warm_up()
        step = median_seconds(trainer._train_step, steps)
        steps_drawn = itertools.count()
        batch = median_seconds(lambda t=trainer, n=steps_drawn: t.sampler.batch(next(n)), steps)  # type: ignore[misc]
        rows.append({"device": device, "step_ms": step * 1e3, "batch_ms": batch * 1e3, "share": batch / step})
    imports = {name: import_seconds(f"import {name}") for name in ("torch", "torch, elman", "torch, elman.cli")}
    table = Table("device", "step, ms", "batch, ms", "share")
    for row in rows:
        table.add_row(row["device"], f"{row['step_ms']:.1f}", f"{row['batch_ms']:.3f}", f"{row['share']:.2%}")
    console.print(table)
    for name, seconds in imports.items():
        console.print(f"import {name}: {seconds:.2f} s")
    if out is not None:
        facts = machine(resolve_device("auto"), commit)
        out.write_text(json.dumps({"machine": facts, "rows": rows, "import_s": imports}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

"""Real training steps, timed and taken apart: what the benchmarks of whole models share."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from elman.training.loop import Trainer

_DATA_BYTES = 1 << 24


def step_times(trainer: Trainer, steps: int) -> list[float]:
    """Milliseconds of each of the next steps: on a GPU between CUDA events, the host being free to run ahead.

    Behind a step ranks agree, from host to host, as they do in training.
    """
    if trainer.device.type != "cuda":
        clock = [time.perf_counter()]
        for _ in range(steps):
            trainer._train_step()
            trainer.processes.largest(0.0)
            clock.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(clock)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        trainer._train_step()
        trainer.processes.largest(0.0)
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def device_slug(device: torch.device) -> str:
    """The device's name as part of a file's."""
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower()) if device.type == "cuda" else device.type


@contextlib.contextmanager
def random_bytes() -> Iterator[Path]:
    """A file to train on, where what is learned does not matter."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "random.bin"
        data.write_bytes(np.random.default_rng(0).integers(256, size=_DATA_BYTES, dtype=np.uint8).tobytes())
        yield data


def forget() -> None:
    """Leave the next model what a new process would find: no memory in use, and no shapes met before."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_json(name: str, value: object, *folders: Path | None) -> None:
    """The same file in each of the folders that are given."""
    for folder in folders:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(value, indent=1) + "\n")

"""Real training steps, timed and taken apart: what the benchmarks of whole models share."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import torch

from elman.training.loop import Trainer


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


def kernels_of_a_step(trainer: Trainer) -> list[dict[str, Any]]:
    """Name, calls and time of every kernel that the next step runs on the GPU, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer._train_step()
        torch.cuda.synchronize()
    found = [
        {"name": event.key[:120], "calls": event.count, "ms": round(event.self_device_time_total / 1e3, 3)}
        for event in profiler.key_averages()
        if event.self_device_time_total
    ]
    return sorted(found, key=lambda kernel: -kernel["ms"])


def device_slug(device: torch.device) -> str:
    """The device's name as part of a file's."""
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower()) if device.type == "cuda" else device.type

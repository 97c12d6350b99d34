"""Real training steps, timed and taken apart: what the benchmarks of whole models share."""

from __future__ import annotations

import itertools
import re
import time

import torch

from elman.training.loop import Trainer


def step_times(trainer: Trainer, steps: int) -> list[float]:
    """Milliseconds of each of the next steps: on a GPU between CUDA events, the host being free to run ahead."""
    if trainer.device.type != "cuda":
        clock = [time.perf_counter()]
        for _ in range(steps):
            trainer._train_step()
            clock.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(clock)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        trainer._train_step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def device_slug(device: torch.device) -> str:
    """The device's name as part of a file's."""
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower()) if device.type == "cuda" else device.type

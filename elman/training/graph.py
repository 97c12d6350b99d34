"""A whole step of training as one CUDA graph: both passes, clipping, the optimiser, and what follows the weights.

A graph is launched at once, however many kernels it holds, so that a step no longer waits for the host: what costs a
small batch some of its speed, and most of it a model whose recurrence runs as a loop of launches, tens of thousands a
step. It replays what was captured, on the same
memory. So all that differs between steps must come from the device: the batch is copied into tensors that stay, the
learning rate and the flag of a skipped step lie on the device, and a carried state is moved back to where it was read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elman.capture import CudaRecorder, Recorder, Step
from elman.data.loading import TensorBatch
from elman.errors import UsageError
from elman.ops import choosing_for_graphs
from elman.training.config import RunConfig

#: Plain steps before the capture: the first makes the optimiser's moments, which a capture would make anew every time.
_WARM_UP_STEPS = 3


class StepGraph:
    """A step that runs plainly a few times, is captured once, and is replayed from then on."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self._recorder = recorder
        self._device = device
        #: Where every step reads its batch; None before the first.
        self.batch: TensorBatch | None = None
        self._plain_steps = 0
        self._replay: Step | None = None

    def place(self, batch: TensorBatch) -> None:
        """Put the next step's batch where every step reads it, and wait for nothing."""
        if self.batch is None:
            self.batch = batch.each(lambda tensor: torch.empty_like(tensor, device=self._device))
        for place, given in zip(self.batch, batch, strict=True):
            if place is not None and given is not None:
                place.copy_(given.pin_memory() if place.is_cuda else given, non_blocking=True)

    @property
    def due(self) -> bool:
        """Whether it is time to capture."""
        return self._replay is None and self._plain_steps >= _WARM_UP_STEPS

    def capture(self, step: Step) -> None:
        """Capture a step; it is not taken."""
        with choosing_for_graphs():
            self._replay = self._recorder.record(step)

    def __call__(self, step: Step) -> Tensor:
        """Take a step, plainly or by what was captured: then ``step`` itself is not called."""
        if self._replay is not None:
            return self._replay().clone()
        self._plain_steps += 1
        with choosing_for_graphs():
            return self._recorder.run(step)


def why_not(config: RunConfig, device: torch.device) -> str | None:
    """In words, why a run's steps cannot be captured, the cure included; None if they can."""
    if device.type != "cuda":
        return f"a CUDA graph needs an NVIDIA GPU, not device {device}: give --graph off"
    if config.optimizer != "adamw":
        return f"--optimizer {config.optimizer} counts on the host: give --optimizer adamw, or --graph off"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "steps of several processes are not captured: give --graph off"
    return None


def make_graph(config: RunConfig, device: torch.device) -> StepGraph | None:
    """What ``--graph`` asks for; None where that is nothing, or ``auto`` and cannot be done.

    Raises:
        UsageError: ``--graph on``, and it cannot be done.
    """
    # A step that is captured in vain cannot be taken back with fp16's scaler, and auto must never end a run.
    if config.graph == "off" or (config.graph == "auto" and config.precision == "fp16"):
        return None
    reason = why_not(config, device)
    if reason is not None and config.graph == "on":
        raise UsageError(f"--graph on: {reason}")
    return None if reason is not None else StepGraph(CudaRecorder(device), device)

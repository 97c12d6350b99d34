"""CUDA graphs: work that is captured once and replayed from then on, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Step = Callable[[], Tensor]


class Recorder(Protocol):
    """How a step is captured."""

    def run(self, step: Step) -> Tensor:
        """A plain step, where it will be captured."""
        ...

    def record(self, step: Step) -> Step:
        """Capture a step without taking it; returns what replays it, its result being overwritten every time."""
        ...


class CudaRecorder:
    """By a CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        # Plain steps run on the stream of the capture too: the libraries' workspaces belong to streams.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, step: Step) -> Tensor:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            values = step()
        current.wait_stream(self._stream)
        values.record_stream(current)
        return values

    def record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # Other threads, of a loader or of a checkpoint, may go on with what a capture forbids in its own.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            values = step()

        def replay() -> Tensor:
            graph.replay()
            return values

        return replay

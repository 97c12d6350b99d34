"""A stand-in for CUDA graphs on the CPU: records the operators of a step, and runs them again on the same tensors.

As a graph does, it knows nothing of the Python around them: a number that the host worked out stays what it was when it
was recorded, and asking the device for one is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[], Tensor]


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: the host asks for a number")
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before += [(x, x.detach().clone()) for x in tree_leaves(value) if isinstance(x, Tensor)]
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tree_leaves(result)))
        return result

    def undo(self) -> None:
        """Take back what recording did, since a capture does nothing."""
        with torch.no_grad():
            for tensor, before in reversed(self._before):
                tensor.detach().copy_(before)
        self._before.clear()

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


class TapeRecorder:
    """As ``elman.capture.CudaRecorder``; counts what it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.plain, self.recorded, self.replayed = 0, 0, 0

    def run(self, step: Step) -> Tensor:
        self.plain += 1
        return step()

    def record(self, step: Step) -> Step:
        self.recorded += 1
        with _Tape() as tape:
            values = step()
        tape.undo()

        def replay() -> Tensor:
            self.replayed += 1
            tape.replay()
            return values

        return replay

"""From numbers on the device to rows of metrics.jsonl."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: A row of metrics.jsonl in the making, and the numbers that complete it.
PendingRow = tuple[dict[str, Any], list[float]]


class PendingRows:
    """Rows whose numbers are still on their way from the device, in the order of their steps.

    Reading a number from a GPU waits for all that was queued before it, and meanwhile nothing new is queued. So each
    step's numbers are copied to the host behind the step, and taken when the next step is already queued.
    """

    def __init__(self) -> None:
        self._rows: deque[tuple[dict[str, Any], Tensor, torch.cuda.Event | None]] = deque()

    def put(self, row: dict[str, Any], values: Tensor) -> None:
        """A step's row, and what it shall be completed by (N,), on any device; waits for nothing."""
        if not values.is_cuda:
            self._rows.append((row, values, None))
            return
        values = values.to("cpu", non_blocking=True)  # to pinned memory
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._rows.append((row, values, copied))

    def take(self, everything: bool) -> Iterator[PendingRow]:
        """Rows and their numbers; without ``everything``, the last row is left where it would have to be waited for."""
        while self._rows:
            row, values, copied = self._rows[0]
            if copied is not None:
                if not everything and len(self._rows) == 1:
                    return
                copied.synchronize()
            self._rows.popleft()
            yield row, values.tolist()

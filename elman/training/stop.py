"""Signals that end a run."""

from __future__ import annotations

import signal
from types import FrameType

from elman.training.distributed import Processes

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP into a flag that the loop reads between steps. A second SIGINT ends at once.

    Of several processes any may be signalled: the flag is up for all of them once they have agreed.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._received = False
        self._agreed = False

    def __bool__(self) -> bool:
        return self._received if self._processes.size == 1 else self._agreed

    def agree(self, seconds: float = 0.0) -> float:
        """Hear of the others' signals, and of the longest time that any of them took."""
        seconds, received = self._processes.largest(seconds, float(self._received))
        self._agreed = bool(received)
        return seconds

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._receive) for number in _STOPPING}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True

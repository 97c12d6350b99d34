"""Two processes, as torchrun would start them, that do what they are told: starting them once makes tests quick."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

#: No test of two small models takes as long, even where many others run beside it.
_PATIENCE = 200.0


class Ranks:
    """``size`` processes; each call of ``run`` is to them a new start by torchrun."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, there))
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function`` returns on each rank; an exception, also that of an exit, is returned as a value."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for pipe in self._pipes:
            pipe.send((port, function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_PATIENCE):
                self.close()
                self._start()
                raise TimeoutError(f"rank {rank} gave no answer")
            results.append(pipe.recv())
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, pipe: Connection) -> None:
    # Sums over a part's rows are then those of one process with a thread.
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    import faulthandler

    import torch

    from tests.endings import make_brief

    torch.set_num_threads(1)
    make_brief()
    while True:
        try:
            port, function, arguments = pipe.recv()
        except EOFError:
            return  # who tells us what to do has gone
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # Where it hangs, the log tells where.
        faulthandler.dump_traceback_later(_PATIENCE * 0.8)
        try:
            result = function(*arguments)
        except SystemExit as end:
            result = end
        except Exception as error:
            traceback.print_exc()
            # With its frames goes the group of processes, as at the end of a process.
            result = error.with_traceback(None)
        gc.collect()
        faulthandler.cancel_dump_traceback_later()
        pipe.send(result)

"""Batches in the order of their steps, made ahead by worker processes where making them takes time."""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elman.data.sampling import Batch, Sampler

#: (B, seq_len + 1) tokens, and (B, seq_len) resets or None.
TensorBatch = tuple[Tensor, Tensor | None]


class _Steps(Dataset[Batch]):
    """A rank's rows of a step's batch under its number."""

    def __init__(self, sampler: Sampler, rank: int, world_size: int) -> None:
        self.sampler = sampler
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> Batch:
        return self.sampler.batch(step, self.rank, self.world_size)


class Loader:
    """The batches of a sampler as tensors. ``workers`` processes make the next ones ahead; none: made when asked for.

    What a step's batch is depends on the sampler alone, of whose rows a rank takes its own, and batches come in the
    order of their steps.
    """

    def __init__(self, sampler: Sampler, workers: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self._steps = _Steps(sampler, rank, world_size)
        self.workers = workers
        self._next = -1
        self._batches: Iterator[Batch] = iter(())
        self._last: TensorBatch | None = None

    def batch(self, step: int) -> TensorBatch:
        """A step's batch; asking for the last one again, or for the one behind it, is cheapest."""
        if self._last is None or step != self._next - 1:
            if step != self._next:
                self._batches, self._next = self._start(step), step
            tokens, reset = next(self._batches)
            self._last = torch.as_tensor(tokens), None if reset is None else torch.as_tensor(reset)
            self._next = step + 1
        return self._last

    def close(self) -> None:
        """End the workers."""
        self._batches, self._next, self._last = iter(()), -1, None

    def _start(self, step: int) -> Iterator[Batch]:
        if not self.workers:
            return map(self._steps.__getitem__, itertools.count(step))
        with warnings.catch_warnings():
            # Of more workers than cores, which is the user's choice, and of forking beside threads, none of which
            # a worker needs.
            warnings.simplefilter("ignore")
            loader = DataLoader(
                self._steps,
                batch_size=None,
                sampler=itertools.count(step),
                num_workers=self.workers,
                # Forked processes share the memory map of the file and the tables of the tokeniser.
                multiprocessing_context="fork",
                worker_init_fn=_leave_signals_to_the_parent,
                # Its own generator: seeds for the workers are not drawn from the one that the run saves.
                generator=torch.Generator(),
            )
            return iter(loader)


def _leave_signals_to_the_parent(worker: int) -> None:
    # A terminal and a job's scheduler signal all processes of a run: the parent saves, and then ends the workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

"""Batches in the order of their steps, made ahead by worker processes where making them takes time."""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from elman.data.sampling import Batch, Batches
from elman.data.streams import Places, TokenStreams

T = TypeVar("T")


class TensorBatch(NamedTuple):
    """A ``Batch`` in tensors."""

    tokens: Tensor
    reset: Tensor | None
    targets: Tensor | None = None

    def each(self, make: Callable[[Tensor], Tensor]) -> TensorBatch:
        """The same of other tensors: ``make`` of each that is there."""
        reset, targets = (None if part is None else make(part) for part in (self.reset, self.targets))
        return TensorBatch(make(self.tokens), reset, targets)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both (B, seq_len)."""
        if self.targets is None:
            return self.tokens[:, :-1], self.tokens[:, 1:]
        return self.tokens, self.targets


class _Steps(Dataset[Batch]):
    """A rank's rows of a step's batch under its number."""

    def __init__(self, sampler: Batches, rank: int, world_size: int) -> None:
        self.sampler = sampler
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> Batch:
        return self.sampler.batch(step, self.rank, self.world_size)


class _Streams(IterableDataset[tuple[Batch, Places]]):
    """From a step on, the batches of streams at some places; of several workers each has a part of the streams."""

    def __init__(self, streams: TokenStreams, step: int, places: Places, parts: int) -> None:
        self.streams, self.step, self.parts = streams, step, np.array_split(places, parts)

    def __iter__(self) -> Iterator[tuple[Batch, Places]]:
        worker = get_worker_info()
        return self.streams.batches(self.step, self.parts[0 if worker is None else worker.id])


class Loader:
    """The batches of a sampler as tensors. ``workers`` processes make the next ones ahead; none: made when asked for.

    What a step's batch is depends on the sampler alone, of whose rows a rank takes its own, and batches come in the
    order of their steps. Those of token streams depend on their places too, which are taken up by ``seek``.
    """

    def __init__(self, sampler: Batches | TokenStreams, workers: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self._sampler = sampler
        self._rank, self._world_size = rank, world_size
        self.workers = workers
        self._next = -1
        self._batches: Iterator[tuple[TensorBatch, Tensor | None]] = iter(())
        self._last: TensorBatch | None = None
        # Streams' places before a step, by the step; for the last one, and for that behind it.
        self._places: dict[int, Tensor] = {}
        if isinstance(sampler, TokenStreams):
            self.seek(0, torch.as_tensor(sampler.first_places()))

    def batch(self, step: int) -> TensorBatch:
        """A step's batch; asking for the last one again, or for the one behind it, is cheapest.

        Of token streams other steps than these cannot be asked for.
        """
        if self._last is None or step != self._next - 1:
            if step != self._next:
                self._batches, self._next = self._start(step), step
            self._last, places = next(self._batches)
            self._next = step + 1
            if places is not None:
                self._places = {step: self._places[step], step + 1: places}
        return self._last

    def places(self, step: int) -> Tensor | None:
        """(B, 2) int64, where a rank's token streams are before a step; None where the step tells all."""
        return self._places[step] if self._places else None

    def seek(self, step: int, places: Tensor) -> None:
        """Go on with a step whose token streams, those of all ranks, are at these places."""
        rows = len(places) // self._world_size
        self.close()
        self._places = {step: places[self._rank * rows : (self._rank + 1) * rows].clone()}

    def close(self) -> None:
        """End the workers."""
        self._batches, self._next, self._last = iter(()), -1, None

    def _start(self, step: int) -> Iterator[tuple[TensorBatch, Tensor | None]]:
        if not isinstance(self._sampler, TokenStreams):
            steps = _Steps(self._sampler, self._rank, self._world_size)
            made = (
                self._made(steps, itertools.count(step))
                if self.workers
                else map(steps.__getitem__, itertools.count(step))
            )
            return ((_tensors(batch), None) for batch in made)
        places = self._places[step].numpy()
        parts = max(1, min(self.workers, len(places)))
        streams = _Streams(self._sampler, step, places, parts)
        return _joined(self._made(streams, None, parts) if self.workers else iter(streams), parts)

    def _made(self, rows: Dataset[T], steps: Iterable[int] | None, workers: int | None = None) -> Iterator[T]:
        """What workers make, in the order of ``steps`` or, without them, one worker's behind the other's."""
        with warnings.catch_warnings():
            # Of more workers than cores, which is the user's choice, and of forking beside threads, none of which
            # a worker needs.
            warnings.simplefilter("ignore")
            loader = DataLoader(
                rows,
                batch_size=None,
                sampler=steps,
                num_workers=workers or self.workers,
                # Forked processes share the memory map of the file and the tables of the tokeniser.
                multiprocessing_context="fork",
                worker_init_fn=_leave_signals_to_the_parent,
                # Its own generator: seeds for the workers are not drawn from the one that the run saves.
                generator=torch.Generator(),
            )
            return iter(loader)


def _tensors(batch: Batch) -> TensorBatch:
    reset, targets = (None if part is None else torch.as_tensor(part) for part in (batch.reset, batch.targets))
    return TensorBatch(torch.as_tensor(batch.tokens), reset, targets)


def _joined(made: Iterator[tuple[Batch, Places]], parts: int) -> Iterator[tuple[TensorBatch, Tensor]]:
    """Of batches that come in parts, whole ones."""
    while True:
        found = [next(made) for _ in range(parts)]
        tokens, resets, _ = zip(*(_tensors(batch) for batch, _ in found), strict=True)
        yield (
            TensorBatch(torch.cat(tokens), torch.cat(resets)),
            torch.cat([torch.as_tensor(places) for _, places in found]),
        )


def _leave_signals_to_the_parent(worker: int) -> None:
    # A terminal and a job's scheduler signal all processes of a run: the parent saves, and then ends the workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

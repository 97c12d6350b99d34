"""Several processes that train one model: who each is, and how they agree.

torchrun starts them, finds each other's address, on one machine or many, and ends all when one fails; it tells each its
place by environment variables. On GPUs they talk by NCCL, beside them and on CPUs by gloo. What is agreed on here goes
by gloo from host to host, so that nobody waits for a GPU; only tensors that lie on a GPU go by NCCL.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from elman.environment import resolve_device
from elman.errors import TrainingError, UsageError
from elman.training.config import RunConfig

T = TypeVar("T")

#: How the processes share the work; ``none`` where there is one.
Kind = Literal["none", "ddp", "fsdp"]


class LostRanksError(TrainingError):
    """Another process has gone, so that this one cannot go on. The other told why."""


@dataclass(frozen=True)
class Processes:
    """A process and those that it trains with.

    Methods that bring ranks together are called by all of them in the same order. With one process they do nothing.

    Attributes:
        rank: 0 to ``size - 1``; 0 writes, prints and draws.
        size: how many there are, on all machines.
        local_rank: the place on this machine, and so the GPU.
        kind: how they share the work.
        background: the same processes' hosts again, for threads that write checkpoints of shards.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    kind: Kind = "none"
    background: Any = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """``--device`` to this process's own device.

        Raises:
            UsageError: no such device, or fewer GPUs than processes on this machine.
        """
        device = resolve_device(name)
        if self.kind == "none" or device.type != "cuda":
            return device
        if device.index is not None and self.size > 1:
            raise UsageError(
                f"--device {name} is one GPU, but torchrun started {self.size} processes: give --device cuda, of which "
                f"each takes its own"
            )
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise UsageError(
                f"torchrun started process {self.local_rank} on this machine, which has {count} GPU(s), 0 to "
                f"{count - 1}: give --nproc_per_node={count}, or --device cpu"
            )
        return torch.device("cuda", self.local_rank if device.index is None else device.index)

    def mean(self, values: Tensor) -> Tensor:
        """The ranks' mean of a tensor, the same on each to the bit; on a GPU the host does not wait for it."""
        return self.sum(values) / self.size if self.size > 1 else values

    def sum(self, values: Tensor) -> Tensor:
        """The ranks' sum of a tensor, the same on each to the bit."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, *values: float) -> tuple[float, ...]:
        """The largest of each value over the ranks, from host to host."""
        if self.size == 1:
            return values
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
        return tuple(reduced.tolist())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def of_main(self, value: T) -> T:
        """What rank 0 has."""
        return self.gather(value)[0]

    def rows(self, state: Any) -> Any:
        """A pytree of tensors (B, ...) to one of all ranks' rows, one rank's behind the other's."""
        if self.size == 1:
            return state

        def whole(leaf: Tensor) -> Tensor:
            # As bytes: gloo does not know every dtype.
            mine = leaf.contiguous().view(torch.uint8)
            parts = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(parts, mine)
            return torch.cat(parts).view(leaf.dtype)

        return tree_map(whole, state)

    def failure(self, error: UsageError | TrainingError) -> BaseException:
        """What to raise where all ranks meet the same failure, of which one is to tell."""
        return error if self.is_main else SystemExit(2 if isinstance(error, UsageError) else 1)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What follows is done when every rank has done what is inside, which brings no ranks together itself.

        Where one meets a user's mistake or a failure of training, all fail, and rank 0 tells of it.
        """
        failure: UsageError | TrainingError | None = None
        try:
            yield
        except (UsageError, TrainingError) as error:
            failure = error
        if self.size == 1:
            if failure is not None:
                raise failure
            return
        told = None if failure is None else (isinstance(failure, UsageError), str(failure))
        for rank, failed in enumerate(self.gather(told)):
            if failed is not None:
                wrong_use, message = failed
                told_of = (UsageError if wrong_use else TrainingError)(f"rank {rank}: {message}")
                raise self.failure(failure or told_of)


#: Without torchrun.
ALONE = Processes()


def launched(environment: Mapping[str, str] = os.environ) -> Processes | None:
    """What torchrun tells this process; None where it did not start it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in environment for name in names):
        return None
    rank, size, local_rank = (int(environment[name]) for name in names)
    return Processes(rank, size, local_rank)


@contextlib.contextmanager
def process_group(config: RunConfig) -> Iterator[Processes]:
    """The processes that share a run, connected from here to the end of the context.

    Raises:
        UsageError: ``--parallel`` does not go with how this process was started.
    """
    started = launched()
    kind = config.parallel
    if kind == "auto":
        kind = "ddp" if started is not None and started.size > 1 else "none"
    if kind == "none":
        if started is not None and started.size > 1:
            complaint = (
                f"--parallel none would train a model in each of the {started.size} processes that torchrun started: "
                f"give --parallel ddp or fsdp, or start one process"
            )
            raise started.failure(UsageError(complaint))
        yield ALONE
        return
    if started is None:
        raise UsageError(
            f"--parallel {kind} shares the work of several processes, but there is one: start them by "
            f"torchrun --nproc_per_node=N -m elman train ..., or give --parallel none"
        )
    processes = Processes(started.rank, started.size, started.local_rank, kind)
    device = processes.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if kind == "fsdp":
        processes = replace(processes, background=dist.new_group(backend="gloo"))
    try:
        yield processes
        # Nobody leaves while another still talks to it. Kept, this is not for gloo's thread to let go of: see below.
        last = torch.zeros(1)
        dist.all_reduce(last)
    except SystemExit:
        if not processes.is_main:
            # As soon as one process ends, torchrun ends the others, and rank 0 is about to tell why.
            time.sleep(1)
        raise
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise LostRanksError(
            f"rank {processes.rank} of {processes.size} lost the others, which have ended "
            f"({_reason(error)}): one of them tells why, unless it was killed, as where memory runs out; "
            f"any checkpoint is whole, to go on from by --resume"
        ) from None
    finally:
        # gloo's threads need Python's lock to let go of a last tensor, and who destroys the group holds it while it
        # waits for them: they hang, if they have not done so yet.
        time.sleep(0.1)
        dist.destroy_process_group()


def _reason(error: RuntimeError) -> str:
    """Its first line, without what gloo says there of its own source and of where to look."""
    return re.sub(r"^\[\S+\.cc:\d+\] |\. This is typically caused by .*", "", str(error).splitlines()[0])


def _is_lost_connection(error: RuntimeError) -> bool:
    # NCCL has a type for it; gloo's is a plain RuntimeError.
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    return any(word in str(error) for word in ("Connection closed by peer", "Connection reset by peer", "gloo"))

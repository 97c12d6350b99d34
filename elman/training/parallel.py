"""How the ranks share a model: not at all, as copies (DDP), or in shards (FSDP2, in ``sharded.py``).

Sources: S. Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (2020); Y. Zhao et al.,
"PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from elman.errors import UsageError
from elman.model import LanguageModel
from elman.training.distributed import Processes

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
#: From a tensor's name, in the model's state or else in the trainer's, its whole shape and its dtype, to memory of the
#: host for a rank's share of it.
Room = Callable[[str, torch.Size, torch.dtype], Tensor]


class Whole:
    """One process has the whole model; the others, if any, are to differ from this where they must."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        #: What training calls; evaluation calls the model itself.
        self.forward: Callable[..., Any] = model
        #: Whether gradients are to stay where they are, so that no rank waits for another that may have failed.
        self.silent = False
        #: What ``load_checkpoint`` reads into, so as to read no more than this rank's share; None where that is all.
        self.room: Room | None = None

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Around both passes of a part of the batch; gradients of all parts are summed before ranks share them."""
        return nullcontext()

    def compile(self, wrap: Wrap) -> None:
        """Have ``wrap``, such as ``torch.compile``, make what runs a layer in training."""
        self.model.compile_training(wrap)

    def after_step(self) -> None:
        """Bring up to date what follows the weights."""
        self.model.after_step()

    def clip_gradients(self, limit: float) -> Tensor:
        """Scale the gradient down to a norm, if it is above. Returns the norm it had."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def place(self, tensor: Tensor, like: Tensor) -> Tensor:
        """What was read to this rank's share of it, a copy, if ``like`` is such a share of a tensor of its shape."""
        return tensor


class Copies(Whole):
    """Each rank has the whole model, and the gradient's mean is taken while the backward pass is still going on."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        with warnings.catch_warnings():
            # Newer versions have another name for this, older ones not yet.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            # Buffers follow the weights by the same arithmetic, so they need not be sent.
            self.copies = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.forward = self.copies

    def part(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last and not self.silent else self.copies.no_sync()

    def compile(self, wrap: Wrap) -> None:
        # It would cut what is compiled where a bucket of gradients is full; ours are cut by layers already.
        torch._dynamo.config.optimize_ddp = False
        super().compile(wrap)


def check_shareable(model: LanguageModel, processes: Processes) -> None:
    """The model can be shared as ``--parallel`` says.

    Raises:
        UsageError: it cannot.
    """
    for name, parameter in model.named_parameters():
        if processes.kind == "fsdp" and parameter.ndim == 0:
            raise UsageError(
                f"--parallel fsdp cannot share {name}, which is a single number: give --parallel ddp, or another "
                f"--constraint"
            )


def share_model(model: LanguageModel, processes: Processes) -> Whole:
    """The model as ``--parallel`` says."""
    if processes.kind == "fsdp":
        # What it imports takes as long as half of PyTorch.
        from elman.training.sharded import Shards

        return Shards(model)
    return Copies(model) if processes.kind == "ddp" else Whole(model)

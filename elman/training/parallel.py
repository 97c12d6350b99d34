"""How the ranks share a model: not at all, as copies (DDP), or in shards (FSDP2).

Sources: S. Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (2020); Y. Zhao et al.,
"PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from elman.errors import UsageError
from elman.mixers.base import FollowsWeights
from elman.model import LanguageModel
from elman.training.distributed import Processes

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Whole:
    """One process has the whole model; the others, if any, are to differ from this where they must."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        #: What training calls; evaluation calls the model itself.
        self.forward: Callable[..., Any] = model
        #: Whether gradients are to stay where they are, so that no rank waits for another that may have failed.
        self.silent = False

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
        """A whole tensor to this rank's share of it, if ``like`` is such a share of a tensor of its shape."""
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


class Shards(Whole):
    """Each rank keeps a part of the weights and moments, and gathers a layer's when it is run.

    Mixers are gathered one by one; the norms, which a layer shares with the one before, and the embedding, which the
    head needs again, all the time that the model runs.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        # The logits are a view of what the head computes, in place of which nothing is written.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # By the model's device: PyTorch would take a GPU where there is one.
        mesh = init_device_mesh(model.embedding.weight.device.type, (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer.mixer, mesh=mesh)  # type: ignore[arg-type]
        # Else the last evaluation's would stay gathered, and the next step run by them.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def part(self, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.model, FSDPModule)
        # Even where silent: gradients that wait to be shared are not let go of by the optimiser.
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def compile(self, wrap: Wrap) -> None:
        """Mixers alone: gathering their weights is nothing that a compiler takes."""
        run = wrap(_forward)
        for layer in self.model.layers:
            mixer: Any = layer.mixer
            if mixer.compiles:
                mixer.forward = functools.partial(_forward_in_training, run, mixer)

    def after_step(self) -> None:
        for layer in self.model.layers:
            mixer: Any = layer.mixer
            following = [module for module in mixer.modules() if isinstance(module, FollowsWeights)]
            if following:
                mixer.unshard()
                for module in following:
                    module.after_step()
                mixer.reshard()

    def clip_gradients(self, limit: float) -> Tensor:
        norm = super().clip_gradients(limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def place(self, tensor: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
            return tensor
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _forward(mixer: nn.Module, *arguments: Any) -> Any:
    return type(mixer).forward(mixer, *arguments)


def _forward_in_training(run: Callable[..., Any], mixer: nn.Module, *arguments: Any) -> Any:
    return (run if mixer.training else _forward)(mixer, *arguments)


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
    return {"none": Whole, "ddp": Copies, "fsdp": Shards}[processes.kind](model)

"""A model of which each rank has a part (FSDP2), and files of such parts that any number of ranks can read.

PyTorch's distributed checkpoint writes them, a safetensors file a rank: reading them executes no code, which its own
format, a pickle, would. This is imported where it is needed: it takes long.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

from elman.mixers.base import FollowsWeights
from elman.model import LanguageModel
from elman.training.parallel import Room, Whole, Wrap

#: What stands in a tree in place of a tensor that lies in the shards, and the tensor's name behind it.
_MARK = "in the shards: "

#: Bytes of a unit's whole weights, but for what a layer more or less makes of them; and units that there are at least.
_UNIT_BYTES, _FEWEST_UNITS = 125_000_000, 4


def units(sizes: Sequence[int]) -> list[range]:
    """The layers that are gathered together, in units that are equal to a layer; a layer's weights take so many bytes.

    Each unit costs the host hooks, collectives and copies. With a layer a unit, what it does for a layer takes it about
    as long as computing takes the GPU, so that gathers come late and overlap with nothing: on two H200s a step of E1
    (403M, 26 layers) took 221 ms with a layer a unit and 160 ms with two; on one GPU by itself it takes 150. But the
    weights and gradients of a unit must fit beside the shards; and the first gather and the last reduction overlap with
    nothing, so that a small model has a few units too.
    """
    layers = len(sizes)
    number = min(layers, max(math.ceil(sum(sizes) / _UNIT_BYTES), _FEWEST_UNITS))
    return [range(i * layers // number, (i + 1) * layers // number) for i in range(number)]


class Shards(Whole):
    """Each rank keeps a part of the weights and moments, and gathers those of a few layers when they are run.

    Mixers are gathered by ``units``; the norms, which a layer shares with the one before, and the embedding, which the
    head needs again, all the time that the model runs.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        # The logits are a view of what the head computes, in place of which nothing is written.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # By the model's device: PyTorch would take a GPU where there is one.
        mesh = init_device_mesh(model.embedding.weight.device.type, (dist.get_world_size(),))
        mixers: list[Any] = [layer.mixer for layer in model.layers]
        sizes = [sum(weight.nbytes for weight in mixer.parameters()) for mixer in mixers]
        #: What follows the weights of a unit, beside one of its mixers, by which all of them are gathered.
        self._following: list[tuple[Any, list[FollowsWeights]]] = []
        for unit in units(sizes):
            together = [mixers[i] for i in unit]
            fully_shard(together, mesh=mesh)
            modules = [module for mixer in together for module in mixer.modules()]
            if following := [module for module in modules if isinstance(module, FollowsWeights)]:
                self._following.append((together[0], following))
        # Else the last evaluation's would stay gathered, and the next step run by them.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        #: Whether ranks share what a backward pass finds; to set it PyTorch walks over the whole model.
        self._reduces = True
        self.room = self._room
        self._unshared = {name for name, tensor in model.state_dict().items() if not isinstance(tensor, DTensor)}

    def part(self, last: bool) -> AbstractContextManager[None]:
        # Even where silent: gradients that wait to be shared are not let go of by the optimiser.
        if last != self._reduces:
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(last)
            self._reduces = last
        return nullcontext()

    def compile(self, wrap: Wrap) -> None:
        """Mixers alone: gathering their weights is nothing that a compiler takes."""
        run = wrap(_forward)
        for layer in self.model.layers:
            mixer: Any = layer.mixer
            if mixer.compiles:
                mixer.forward = functools.partial(_forward_in_training, run, mixer)

    def after_step(self) -> None:
        for mixer, following in self._following:
            mixer.unshard()
            for module in following:
                module.after_step()
            mixer.reshard()

    @torch.no_grad()
    def clip_gradients(self, limit: float) -> Tensor:
        """By the shares themselves: operations on DTensors take the host several times as long."""
        gradients: list[Any] = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        shares = [gradient.to_local() for gradient in gradients]
        squares = torch.nn.utils.get_total_norm(shares).square()
        dist.all_reduce(squares)
        norm = squares.sqrt()
        torch._foreach_mul_(shares, (limit / (norm + 1e-6)).clamp(max=1.0))  # as PyTorch's own clips
        return norm

    @functools.cached_property
    def _hosts(self) -> DeviceMesh:
        """The ranks, with their shares in the hosts' memory."""
        return init_device_mesh("cpu", (dist.get_world_size(),))

    def _room(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if name in self._unshared:
            return _whole(name, shape, dtype)
        return empty(shape, dtype=dtype, device_mesh=self._hosts, placements=[Shard(0)])

    def place(self, tensor: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return tensor.clone()  # for it may lie in a file
        if isinstance(tensor, DTensor):
            share = tensor.to_local().to(like.device)
        else:
            # Cut on the host, so that of what lies in a file no more is read, or sent to a GPU, than this rank's share.
            cut = distribute_tensor(tensor, self._hosts, like.placements, src_data_rank=None)
            share = cut.to_local().to(like.device, copy=True)
        return DTensor.from_local(
            share, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def _forward(mixer: nn.Module, *arguments: Any) -> Any:
    return type(mixer).forward(mixer, *arguments)


def _forward_in_training(run: Callable[..., Any], mixer: nn.Module, *arguments: Any) -> Any:
    return (run if mixer.training else _forward)(mixer, *arguments)


def take_shards(tree: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """A tree without its sharded tensors, which are marked, and these by names that begin with ``name``."""
    shards: dict[str, Tensor] = {}

    def take(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        key = name + keystr(path)
        shards[key] = leaf.detach()
        return _MARK + key

    return tree_map_with_path(take, tree), shards


def put_shards(tree: Any, shards: dict[str, Tensor]) -> Any:
    """The tree of ``take_shards``, the tensors back in their places."""

    def put(leaf: Any) -> Any:
        return shards[leaf.removeprefix(_MARK)] if isinstance(leaf, str) and leaf.startswith(_MARK) else leaf

    return tree_map(put, tree)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong on some rank as an ``OSError``: PyTorch's own is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        raise OSError(
            "; ".join(dict.fromkeys(f"{type(failure).__name__}: {failure}" for failure in failures))
        ) from None


def write_shards(shards: dict[str, Tensor], folder: Path, group: dist.ProcessGroup) -> Callable[[], None]:
    """Write each rank's shards into a folder, in the background; the tensors may change once this returns.

    Called by all ranks. ``group``: of their hosts, for nothing else. What it returns comes back when all have written
    theirs, or raises an ``OSError`` on all.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    future = dcp.async_save(shards, storage_writer=writer, process_group=group)
    assert isinstance(future, Future)

    def finish() -> None:
        with _plain_errors():
            future.result()

    return finish


def _whole(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def read_shards(folder: Path, prefix: str, room: Room | None = None) -> dict[str, Tensor]:
    """The tensors, on the CPU, whose names begin with ``prefix``; each process reads for itself.

    ``room`` is given the names without it. Of the DTensors that it makes, this rank's share is read, and no more;
    without it all tensors are whole.
    """
    room = room or _whole
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        name: room(name.removeprefix(prefix), about.size, about.properties.dtype)  # type: ignore[union-attr]
        for name, about in found.items()
        if name.startswith(prefix)
    }
    with _plain_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors

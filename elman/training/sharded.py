"""Tensors of which each rank has a part, in files that any number of ranks can read.

PyTorch's distributed checkpoint writes them, a safetensors file a rank: reading them executes no code, which its own
format, a pickle, would.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

#: What stands in a tree in place of a tensor that lies in the shards, and the tensor's name behind it.
_MARK = "in the shards: "


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


def write_shards(shards: dict[str, Tensor], folder: Path, group: dist.ProcessGroup) -> Future[Any]:
    """Write each rank's shards into a folder, in the background; the tensors may change once this returns.

    Called by all ranks. ``group``: of their hosts, for nothing else.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    future = dcp.async_save(shards, storage_writer=writer, process_group=group)
    assert isinstance(future, Future)
    return future


def read_shards(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors, whole and on the CPU, whose names begin with ``prefix``; each process reads for itself."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)  # type: ignore[union-attr]
        for name, about in found.items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors

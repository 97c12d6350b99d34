"""Queues a kernel on the GPU: all that launches have in common, on top of ``cuda-core``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from elman.ops.cuda.compiler import Module, kernels

if TYPE_CHECKING:
    from cuda.core import Kernel


class NoRoomError(RuntimeError):
    """The GPU does not run so many blocks, or clusters of them, at a time as a cooperative launch needs."""


#: What the driver says then.
_NO_ROOM = ("COOPERATIVE_LAUNCH_TOO_LARGE", "INVALID_CLUSTER_SIZE")


def launch(
    module: Module,
    name: str,
    blocks: int,
    threads: int,
    arguments: Sequence[Tensor | float | None],
    device: torch.device,
    *,
    shared_bytes: int = 0,
    cluster: int | None = None,
    cooperative: bool = False,
) -> None:
    """Queues ``blocks`` blocks of ``threads`` threads on the current stream of a device.

    Args:
        module: of the kernel; compiled and loaded at the first call.
        name: of the kernel, one of ``module.kernels``.
        blocks: of the grid, which has one dimension; a multiple of ``cluster``.
        threads: of a block, likewise.
        arguments: in the kernel's order; a tensor is its address, None a null pointer. Of an int the kernel may take
            fewer than its 8 bytes, a float is a double.
        device: a CUDA device, of all tensors.
        shared_bytes: dynamic shared memory a block, up to what the device has.
        cluster: blocks of a cluster, up to what the device takes, where the kernel is written for clusters.
        cooperative: all blocks run at a time, or the launch fails.

    Raises:
        CompilerUnavailableError: no NVRTC, or one that cannot compile for this device.
        NoRoomError: ``cooperative``, and not all blocks find room; nothing has run.
    """
    from cuda.core import Device, LaunchConfig, Stream
    from cuda.core import launch as queue

    with torch.cuda.device(device):
        # A thread of autograd's that has not run a kernel yet has no CUDA context.
        Device(device.index).set_current()
        kernel = _kernel(module, name, device.index, shared_bytes > 0, cluster is not None)
        config = LaunchConfig(
            grid=blocks // (cluster or 1),  # in clusters, where there are any
            cluster=cluster,
            block=threads,
            shmem_size=shared_bytes,
            is_cooperative=cooperative,
        )
        stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        try:
            queue(stream, config, kernel, *map(_eight_bytes, arguments))
        except Exception as error:
            if not any(words in str(error) for words in _NO_ROOM):
                raise
            raise NoRoomError(
                f"{torch.cuda.get_device_name(device)} does not run {blocks} blocks of {name} at a time"
            ) from error


def aligned(x: Tensor, width: int) -> Tensor:
    """Contiguous and aligned to packs of so many neighbours, as results of ours are from the start."""
    x = x.contiguous()
    return x if x.data_ptr() % (width * x.itemsize) == 0 else x.clone()


def _eight_bytes(argument: Tensor | float | None) -> np.int64 | np.float64:
    """An argument as the driver takes it, which knows how many bytes, from the lowest on, the kernel wants."""
    if isinstance(argument, float):
        return np.float64(argument)
    return np.int64(argument.data_ptr() if isinstance(argument, Tensor) else argument or 0)


@functools.cache
def _kernel(module: Module, name: str, index: int, uses_shared: bool, uses_clusters: bool) -> Kernel:
    """Compiled and loaded, with leave to use all shared memory and clusters of any size on this device, if it does.

    All, because launches of one kernel need not agree on the memory, and the last limit that is set holds for all.
    """
    from cuda.bindings import driver

    properties = torch.cuda.get_device_properties(index)
    kernel = kernels(module, (properties.major, properties.minor))[name]
    attributes, device = driver.CUfunction_attribute, driver.CUdevice(index)
    wanted = {}
    if uses_shared:
        status, static = driver.cuKernelGetAttribute(
            attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, kernel.handle, device
        )
        if status:
            raise RuntimeError(f"cannot ask for the shared memory of {name}: {status.name}")
        limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        wanted[attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES] = limit - static
    if uses_clusters:
        wanted[attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
    for attribute, value in wanted.items():
        (status,) = driver.cuKernelSetAttribute(attribute, value, kernel.handle, device)
        if status:
            raise RuntimeError(f"cannot prepare {name}: {status.name} for {attribute.name} = {value}")
    return kernel

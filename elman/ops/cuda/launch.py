"""Launches a kernel through the driver's own interface.

Not ``cuda.core.launch``: its version 1.2 leaves the rest of a launch attribute as the stack had it, and a launch of
clusters was seen to be refused (``CUDA_ERROR_INVALID_VALUE``) that had gone well a moment before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from cuda.core import Kernel


def make_current(device: torch.device) -> None:
    """Gives this thread the device's context, which a thread of autograd's that has run no kernel yet lacks."""
    from cuda.core import Device

    Device(device.index).set_current()


def launch(
    kernel: Kernel,
    blocks: int,
    threads: int,
    arguments: Sequence[Tensor | int | None],
    device: torch.device,
    *,
    shared_bytes: int = 0,
    cluster: int | None = None,
    cooperative: bool = False,
) -> None:
    """Queues ``blocks`` blocks of ``threads`` threads on the current stream of a device.

    Args:
        kernel: compiled and loaded.
        blocks: of the grid, which has one dimension; a multiple of ``cluster``.
        threads: of a block, likewise.
        arguments: in the kernel's order; a tensor is its address, None a null pointer.
        device: the current CUDA device.
        shared_bytes: dynamic shared memory a block.
        cluster: blocks of a cluster, where the kernel is written for clusters.
        cooperative: all blocks run at a time, or the launch fails.
    """
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    attributes = []
    if cluster is not None:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = cluster, 1, 1
        attributes.append(attribute)
    if cooperative:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)

    # Every argument has 8 bytes here; of a narrower one the driver takes the first, which are its low ones.
    values = np.array([_number(argument) for argument in arguments], np.int64)
    pointers = values.ctypes.data + 8 * np.arange(len(values))
    function = driver.CUfunction(int(kernel.handle))
    (status,) = driver.cuLaunchKernelEx(config, function, pointers.ctypes.data, 0)
    if status:
        raise RuntimeError(f"cannot launch a kernel of {blocks} blocks in clusters of {cluster}: {status.name}")


def _number(argument: Tensor | int | None) -> int:
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, Tensor) else argument

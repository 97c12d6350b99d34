"""Repeats recorded launches on buffers of their exact sizes, for a tool to watch; imports no PyTorch.

Prints ``start N`` before launch N and a line that starts with ``done N`` after it: the outcome, seconds, and words. The
exit code is 1 if any went wrong, and ``CONTEXT_LOST`` where none could follow.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.sanitize.launches import Launch, Place, load

CONTEXT_LOST = 4


class GpuError(RuntimeError):
    """The driver's word for what went wrong."""


class Device(Protocol):
    """What a launch needs of a GPU; ``Gpu`` is it."""

    def allocate(self, size: int) -> int: ...

    def free(self, address: int) -> None: ...

    def write(self, address: int, data: np.ndarray) -> None: ...

    def read(self, address: int, size: int) -> np.ndarray: ...

    def run(self, launch: Launch, arguments: Sequence[np.int64 | np.float64]) -> None: ...


class Gpu:
    """The first GPU, by the driver; every call waits until it is done."""

    def __init__(self) -> None:
        from cuda.bindings import driver
        from cuda.core import Device

        self._driver = driver
        device = Device(0)
        device.set_current()
        self._index, self._stream = device.device_id, device.create_stream()
        self._kernels: dict[tuple[bytes, str], Any] = {}

    def allocate(self, size: int) -> int:
        return int(self._value(self._driver.cuMemAlloc(size)))

    def free(self, address: int) -> None:
        self._value(self._driver.cuMemFree(address))

    def write(self, address: int, data: np.ndarray) -> None:
        self._value(self._driver.cuMemcpyHtoD(address, data.ctypes.data, data.nbytes))

    def read(self, address: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        self._value(self._driver.cuMemcpyDtoH(data.ctypes.data, address, size))
        return data

    def run(self, launch: Launch, arguments: Sequence[np.int64 | np.float64]) -> None:
        from cuda.core import LaunchConfig
        from cuda.core import launch as queue

        self.wait()  # for the copies, which are on another stream
        x, y, z = launch.grid
        config = LaunchConfig(
            grid=(x // (launch.cluster or 1), y, z),
            cluster=launch.cluster,
            block=launch.threads,
            shmem_size=launch.shared_bytes,
            is_cooperative=launch.cooperative,
        )
        queue(self._stream, config, self._kernel(launch), *arguments)
        self.wait()

    def wait(self) -> None:
        self._value(self._driver.cuCtxSynchronize())

    def _kernel(self, launch: Launch) -> Any:
        from cuda.core import ObjectCode

        name = launch.cubin, launch.symbol
        if name not in self._kernels:
            self._kernels[name] = ObjectCode.from_cubin(launch.cubin).get_kernel(launch.symbol)
        kernel, attributes = self._kernels[name], self._driver.CUfunction_attribute
        wanted = {}
        if launch.shared_bytes:
            wanted[attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES] = launch.shared_bytes
        if launch.cluster is not None:
            wanted[attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
        for attribute, value in wanted.items():
            device = self._driver.CUdevice(self._index)
            self._value(self._driver.cuKernelSetAttribute(attribute, value, kernel.handle, device))
        return kernel

    def _value(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status:
            raise GpuError(status.name)
        return values[0] if values else None


def repeat(launch: Launch, device: Device, bare: bool = False) -> list[int]:
    """Runs a launch again; the buffers that came out otherwise than they were recorded.

    ``bare`` leaves out of the GPU's memory what the kernel has not been given, and compares nothing.
    """
    addresses: list[int] = []
    for buffer in launch.buffers:
        addresses.append(device.allocate(buffer.before.nbytes))
        if not (bare and buffer.written_only):
            device.write(addresses[-1], buffer.before)
    device.run(launch, [_number(argument, addresses) for argument in launch.arguments])
    differing = [
        index
        for index, (buffer, address) in enumerate(zip(launch.buffers, addresses, strict=True))
        if buffer.after is not None
        and not bare
        and not np.array_equal(device.read(address, buffer.after.nbytes), buffer.after)
    ]
    for address in addresses:  # which a lost context would not take, so not after an error
        device.free(address)
    return differing


def _number(argument: Place | float, addresses: Sequence[int]) -> np.int64 | np.float64:
    if isinstance(argument, Place):
        return np.int64(addresses[argument.buffer] + argument.offset)
    return np.float64(argument) if isinstance(argument, float) else np.int64(argument)


def repeat_all(launches: Sequence[Launch], device: Device, first: int, seconds: float, bare: bool = False) -> int:
    """From launch ``first`` on, while there is time; the exit code."""
    end = time.monotonic() + seconds
    code = 0
    for number, launch in enumerate(launches):
        if number < first:
            continue
        if time.monotonic() >= end:
            break
        print("start", number, flush=True)
        start = time.monotonic()
        lost = False
        try:
            differing = repeat(launch, device, bare)
            outcome = f"differs in {','.join(map(str, differing))}" if differing else "ok"
        except Exception as error:  # of the driver, or of cuda-core: whatever it is, the table shall have it
            outcome = f"failed with {str(error) or type(error).__name__}".splitlines()[0]
            lost = not _lives(device)
        code = code if outcome == "ok" else 1
        took = time.monotonic() - start
        print(f"done {number} | {outcome} | {took:.3f} | {launch.family}: {launch.words}", flush=True)
        if lost:
            return CONTEXT_LOST
    return code


def _lives(device: Device) -> bool:
    """After an error: whether launches can follow, or the context is lost to them."""
    try:
        device.free(device.allocate(1))
    except Exception:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="with the recorded launches")
    parser.add_argument("--first", type=int, default=0, help="the number of the launch to begin with")
    parser.add_argument("--seconds", type=float, default=60, help="no launch starts later")
    parser.add_argument("--bare", action="store_true", help="leave memory as it is where the kernel only writes")
    args = parser.parse_args()
    return repeat_all(load(args.folder), Gpu(), args.first, args.seconds, args.bare)


if __name__ == "__main__":
    sys.exit(main())

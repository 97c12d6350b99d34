"""Runs small problems on every family of kernels and records their launches, memory included.

What a kernel is only to write is NaN before (PyTorch fills it, when told to be deterministic), so that what it leaves
out shows, and a tool can be told from what it may read.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.compiling import compile_ahead
from benchmarks.sanitize import control
from benchmarks.sanitize.cases import DTYPES, Case, cases
from benchmarks.sanitize.launches import Buffer, Launch, Place, save
from elman.ops import diagonal, gated_softmax, loop, matrix_kernels, norm, persistent, scan
from elman.ops.cells import FUSED_CELLS
from elman.ops.cuda.compiler import Binary, Module, architecture, compile_module
from elman.ops.cuda.launch import launch as launch_on_gpu

# The package has the functions of these names.
banks, short_conv = (importlib.import_module(f"elman.ops.{name}") for name in ("banks", "short_conv"))


class Recorder:
    """Stands in for ``elman.ops.cuda.launch.launch``, and for the loop's own launches.

    Attributes:
        launches: those so far.
        modules: of all kernels that were to be launched.
        family, words: for the launches to come.
    """

    def __init__(self, run: Callable[..., None], compiled: Callable[[Module], Binary]) -> None:
        """``run`` launches a kernel as ``elman.ops.cuda.launch.launch`` does."""
        self.launches: list[Launch] = []
        self.modules: dict[Module, None] = {}
        self.family = self.words = ""
        self._run, self._compiled = run, functools.cache(compiled)

    def __call__(
        self,
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
        options = {"shared_bytes": shared_bytes, "cluster": cluster, "cooperative": cooperative}
        with self.recording(module, name, (blocks, 1, 1), threads, arguments, **options):
            self._run(module, name, blocks, threads, arguments, device, **options)

    @contextlib.contextmanager
    def recording(
        self,
        module: Module,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Tensor | float | None],
        *,
        shared_bytes: int = 0,
        cluster: int | None = None,
        cooperative: bool = False,
    ) -> Iterator[None]:
        """Around a launch: keeps what is in memory before and after it."""
        self.modules[module] = None
        binary = self._compiled(module)
        runs = _runs([x for x in arguments if isinstance(x, Tensor)])
        before = [run.bytes() for run in runs]
        written_only = [run.holds_nothing() for run in runs]
        yield
        after = [None if run.is_workspace() else run.bytes() for run in runs]
        # What was only read is kept once.
        after = [
            old if new is not None and np.array_equal(old, new) else new for old, new in zip(before, after, strict=True)
        ]
        self.launches.append(
            Launch(
                family=self.family,
                words=f"{self.words}, {name}",
                cubin=binary.cubin,
                symbol=binary.symbols[name],
                grid=grid,
                threads=threads,
                shared_bytes=shared_bytes,
                cluster=cluster,
                cooperative=cooperative,
                arguments=tuple(_recorded(argument, runs) for argument in arguments),
                buffers=tuple(Buffer(*of) for of in zip(before, after, written_only, strict=True)),
            )
        )


@dataclass
class _Run:
    """Bytes of GPU memory from ``start`` to ``stop``, and the tensors that lie in them."""

    start: int
    stop: int
    tensors: list[Tensor]

    def bytes(self) -> np.ndarray:
        storage = self.tensors[0].untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8, device=self.tensors[0].device)
        whole.set_(storage, self.start - storage.data_ptr(), (self.stop - self.start,), (1,))
        return whole.cpu().numpy().copy()

    def holds_nothing(self) -> bool:
        return all(x.is_floating_point() and bool(x.isnan().all()) for x in self.tensors)

    def is_workspace(self) -> bool:
        """Bytes are what kernels hand each other; what is left of them depends on who came when."""
        return all(x.dtype == torch.uint8 for x in self.tensors)


def _runs(tensors: Iterable[Tensor]) -> list[_Run]:
    """The memory of tensors, those that overlap in one run."""
    found: list[_Run] = []
    for x in sorted((x for x in tensors if x.numel()), key=Tensor.data_ptr):
        span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        start, stop = x.data_ptr(), x.data_ptr() + span * x.itemsize
        if found and start < found[-1].stop:
            found[-1].stop = max(stop, found[-1].stop)
            found[-1].tensors.append(x)
        else:
            found.append(_Run(start, stop, [x]))
    return found


def _recorded(argument: Tensor | float | None, runs: Sequence[_Run]) -> Place | int | float:
    if not isinstance(argument, Tensor):
        return argument or 0
    address = argument.data_ptr()
    found = (Place(number, address - run.start) for number, run in enumerate(runs) if run.start <= address < run.stop)
    return next(found, 0)


@contextlib.contextmanager
def _loop_recorded(recorder: Recorder) -> Iterator[None]:
    """The loop's launches, whose arguments are addresses: tensors are told by them."""
    from cuda.bindings import driver

    known: dict[int, Tensor] = {}
    module_and_names: dict[int, tuple[Module, str]] = {}
    count = 0
    original = {name: getattr(loop._KernelSteps, name) for name in ("forward", "backward", "_launcher")}
    launch = driver.cuLaunchKernel

    def walk(direction: str) -> Callable[..., object]:
        def start(steps: loop._KernelSteps, x: loop.Forward | loop.Backward) -> object:
            known.clear()
            of_steps = ("drec", "dpre", "dh", "pre", "reset", "saved", "states")
            for name, value in vars(x).items():
                for tensor in value if isinstance(value, Sequence) else [value]:
                    if isinstance(tensor, Tensor):
                        for piece in tensor.unbind(0) if name in of_steps else [tensor]:
                            known.setdefault(piece.data_ptr(), piece)  # drec may be a part of dpre, which came first
            return original[direction](steps, x)

        return start

    def launcher(steps: loop._KernelSteps, direction: str, arguments: Sequence[object], given: Any) -> object:
        nonlocal count
        count = len(arguments) + 1
        # The loop may have made its own copy of one that all steps share.
        for x in given:
            if x is not None and x.ndim < 3:
                known.setdefault(x.data_ptr(), x)
        module = loop.step_module(steps.cell.name, steps.like.dtype)
        module_and_names.update((int(kernel.handle), (module, name)) for name, kernel in steps.kernels.items())
        return original["_launcher"](steps, direction, arguments, given)

    def step(function: object, x: int, y: int, z: int, threads: int, *rest: Any) -> object:
        table = (ctypes.c_int64 * count).from_address(rest[-2])
        numbers = [ctypes.c_int64.from_address(address).value for address in table]
        arguments = [known.get(number, number) for number in numbers]
        with recorder.recording(*module_and_names[int(function)], (x, y, z), threads, arguments):
            return launch(function, x, y, z, threads, *rest)

    hooks = {"forward": walk("forward"), "backward": walk("backward"), "_launcher": launcher}
    with mock.patch.multiple(loop._KernelSteps, **hooks), mock.patch.object(driver, "cuLaunchKernel", step):
        yield


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """New memory is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def record(wanted: Iterable[Case], recorder: Recorder, device: str) -> None:
    """Runs cases; what goes wrong with one is an error only after the others."""
    errors = []
    launching = (control, persistent, diagonal, banks, norm, scan, gated_softmax, short_conv, matrix_kernels)
    hooks = [mock.patch.object(module, "launch", recorder) for module in launching]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for hook in (*hooks, _poisoned(), _loop_recorded(recorder)):
            stack.enter_context(hook)
        for case in wanted:
            recorder.family, recorder.words = case.family, case.words
            try:
                case.run(device)
            except Exception as error:
                error.add_note(f"in {case.family}, {case.words}")
                errors.append(error)
    if errors:
        raise ExceptionGroup("cases that could not be recorded", errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the launches")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or its products warn of being not deterministic
    chip, arch = persistent.chip_of(0), architecture(torch.cuda.get_device_capability(0))
    wanted = cases(chip)

    # First without launching anything, for the modules alone.
    nothing = Recorder(lambda *args, **options: None, lambda module: Binary(b"", _AnyName(), ""))
    record((case for case in wanted if case.family != "step"), nothing, "cuda:0")
    steps = [loop.step_module(cell, dtype) for cell in FUSED_CELLS for dtype in DTYPES]
    print(f"{compile_ahead([*nothing.modules, *steps], arch)} modules compiled", flush=True)

    recorder = Recorder(launch_on_gpu, lambda module: compile_module(module, arch))
    try:
        record(wanted, recorder, "cuda:0")
    finally:
        save(recorder.launches, args.folder)
        print(f"{len(recorder.launches)} launches recorded", flush=True)
    return 0


class _AnyName(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name


if __name__ == "__main__":
    sys.exit(main())

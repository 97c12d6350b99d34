"""Runs the persistent kernels without a GPU: their sources, built by a host compiler on ``emulated_primitives.cuh``."""

from __future__ import annotations

import atexit
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elman.ops import backends, persistent
from elman.ops.cuda import compiler
from elman.ops.cuda.compiler import Module
from elman.ops.planning import Chip

PRIMITIVES = Path(__file__).with_name("emulated_primitives.cuh")
HOPPER = Path(__file__).with_name("emulated_hopper.cuh")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def _source(name: str) -> str:
    """As shipped, but for what a host compiler cannot read."""
    text = (Path(compiler.__file__).parent / name).read_text()
    return text.replace("extern __shared__ __align__(128) char shared[];", "char* shared = emulator::shared_memory();")


def _run_compiler(*arguments: str) -> None:
    command = ["g++", "-std=c++17", "-Og", "-w", "-fPIC", *arguments]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[:3000]


@functools.cache
def _standard_headers() -> str:
    """Those of the primitives in one header, compiled ahead: to read them takes as long as the kernels do."""
    header = Path(_make_folder()) / "standard.h"
    header.write_text("\n".join(re.findall(r"#include <.*>", PRIMITIVES.read_text())) + "\n")
    _run_compiler("-x", "c++-header", str(header), "-o", f"{header}.gch")
    return str(header)


@functools.cache
def _build(source: str, kernel: str, folder: str) -> ctypes.CDLL:
    """A library whose ``emulate(blocks, threads, shared_bytes, cluster, seed, arguments)`` runs the kernel."""
    where = Path(folder)
    for path in Path(compiler.__file__).parent.glob("*.cuh"):
        (where / path.name).write_text(_source(path.name))
    shutil.copy(PRIMITIVES, where / "primitives.cuh")
    shutil.copy(HOPPER, where / "hopper.cuh")
    number = len(list(where.glob("*.cpp")))
    file = where / f"kernel{number}.cpp"
    file.write_text(f"""
#include "primitives.cuh"
#include "{source}"
template <typename... Parameters, size_t... kIndex>
void call(void (*kernel)(Parameters...), const long long* given, index_sequence<kIndex...>) {{
  kernel((Parameters)given[kIndex]...);
}}
template <typename... Parameters>
void call(void (*kernel)(Parameters...), const long long* given) {{
  call(kernel, given, index_sequence_for<Parameters...>());
}}
extern "C" const char* emulate(int blocks, int threads, int shared_bytes, int cluster, unsigned seed,
                               const long long* given) {{
  return emulator::run(blocks, threads, shared_bytes, cluster, seed, [=]() {{ call({kernel}, given); }});
}}
""")
    library = file.with_suffix(".so")
    _run_compiler("-include", _standard_headers(), "-shared", "-I", folder, str(file), "-o", str(library))
    found = ctypes.CDLL(str(library))
    found.emulate.restype = ctypes.c_char_p
    return found


class Emulator:
    """Stands in for ``elman.ops.cuda.launch.launch``.

    Attributes:
        kernels: the names of those that ran, in order.
        blocks: of the last launch.
        seed: of the order in which threads run.
    """

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.blocks, self.seed = 0, 0

    def __call__(
        self,
        module: Module,
        name: str,
        blocks: int,
        threads: int,
        arguments: Sequence[Tensor | int | None],
        device: torch.device,
        *,
        shared_bytes: int,
        cluster: int | None,
        cooperative: bool,
    ) -> None:
        assert cooperative or cluster is not None
        assert blocks % (cluster or 1) == 0
        given = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments]
        library = _build(module.source, name, _folder())
        self.kernels.append(re.split("<", name)[0])
        self.blocks, self.seed = blocks, self.seed + 1
        sizes = blocks, threads, shared_bytes, cluster or 1, self.seed
        error = library.emulate(*sizes, (ctypes.c_longlong * len(given))(*given))
        assert error is None, error.decode()


@functools.cache
def _folder() -> str:
    return _make_folder()


def _make_folder() -> str:
    folder = tempfile.mkdtemp(prefix="elman-emulator-")
    atexit.register(shutil.rmtree, folder)
    return folder


def emulate(patch: pytest.MonkeyPatch, chip: Chip) -> Emulator:
    """The persistent backend runs CPU tensors on an emulated GPU like ``chip``."""
    emulator = Emulator()
    backend = replace(backends.BACKENDS["persistent"], why_not=lambda problem: None)
    patch.setitem(backends.BACKENDS, "persistent", backend)
    patch.setattr(persistent, "chip_of", lambda index: chip)
    patch.setattr(persistent, "launch", emulator)
    return emulator

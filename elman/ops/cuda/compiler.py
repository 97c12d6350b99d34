"""Compiles the shipped CUDA sources when they are first needed, with NVRTC through ``cuda-core``.

NVRTC comes with PyTorch's CUDA wheels: no nvcc, no host compiler and no GPU is needed to compile. ``cuda-core`` is
imported on first use, so that ``import elman`` works without it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import re
import threading
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from elman.ops.cuda import cache
from elman.ops.registration import constant_when_traced

if TYPE_CHECKING:
    from cuda.core import Kernel

#: What NVRTC is told beside the architecture; ptxas's report gives the resources of every kernel.
_OPTIONS = {"std": "c++17", "lineinfo": True, "ptxas_options": ["-v"]}


class CompilerUnavailableError(RuntimeError):
    """Kernels cannot be compiled here; the message says why, and what would help."""


@dataclass(frozen=True)
class Module:
    """One translation unit: a shipped source and the kernels of it that are wanted.

    Attributes:
        source: file name beside this one; what it includes is found there too.
        kernels: C++ names of the kernels, template arguments included: ``"step_forward<Tanh, bf16, 8>"``.
        defines: macros, as (name, value).
        architectures: what it compiles for, the empty tuple being everything that NVRTC knows.
        spill_limit: bytes a thread that its kernels may spill, each way; a test holds them to it.
    """

    source: str
    kernels: tuple[str, ...]
    defines: tuple[tuple[str, str], ...] = ()
    architectures: tuple[str, ...] = ()
    spill_limit: int = 0


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel. Spills are in bytes a thread, shared memory is the static part in bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Binary:
    """A compiled module: the cubin, the symbol of every kernel by its C++ name, and the compiler's words."""

    cubin: bytes
    symbols: dict[str, str]
    log: str

    def resources(self) -> dict[str, Resources]:
        """By C++ name of the kernel."""
        found = {}
        for report in self.log.split("Compiling entry function ")[1:]:
            symbol = report.split("'")[1]
            name = next(name for name, mangled in self.symbols.items() if mangled == symbol)
            found[name] = Resources(
                registers=_number(r"Used (\d+) registers", report),
                spill_stores=_number(r"(\d+) bytes spill stores", report),
                spill_loads=_number(r"(\d+) bytes spill loads", report),
                stack=_number(r"(\d+) bytes stack frame", report),
                shared=_number(r"(\d+) bytes smem", report),
            )
        return found

    def to_bytes(self) -> bytes:
        head = json.dumps({"symbols": self.symbols, "log": self.log}).encode()
        return len(head).to_bytes(8, "little") + head + self.cubin

    @classmethod
    def from_bytes(cls, data: bytes) -> Binary:
        end = 8 + int.from_bytes(data[:8], "little")
        return cls(cubin=data[end:], **json.loads(data[8:end]))


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


@functools.cache
def flatten(source: str) -> str:
    """A shipped source with its includes in place, each once: the text that is compiled is the text that is hashed."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        lines = resources.files(__package__).joinpath(name).read_text().splitlines()
        text = [f'#line 1 "{name}"']
        for number, line in enumerate(lines, 1):
            include = re.fullmatch(r'\s*#include "(\S+)"\s*', line)
            if include:
                text += [expand(include[1]), f'#line {number + 1} "{name}"']
            elif line.strip() != "#pragma once":
                text.append(line)
        return "\n".join(text)

    return expand(source) + "\n"


@functools.cache
def compiler_version() -> str:
    """NVRTC's version.

    Raises:
        CompilerUnavailableError: it, or ``cuda-core``, is not installed.
    """
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompilerUnavailableError(f"{error}: pip install cuda-core") from error
    try:
        result, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # cuda-pathfinder raises errors of several kinds for a library that it does not find
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CompilerUnavailableError(f"NVRTC cannot be loaded ({reason}): pip install nvidia-cuda-nvrtc") from error
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompilerUnavailableError(f"NVRTC does not work ({result.name}): pip install nvidia-cuda-nvrtc")
    try:  # NVRTC itself tells no patch level
        return importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        return f"{major}.{minor}"


@constant_when_traced
def has_compiler() -> bool:
    """Whether kernels can be compiled here."""
    try:
        compiler_version()
    except CompilerUnavailableError:
        return False
    return True


def architecture(capability: tuple[int, int]) -> str:
    """The target for a GPU of this compute capability, with the features of its very generation from Hopper on."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def key(module: Module, arch: str) -> str:
    """The name of a compiled module in the cache: everything that decides what is in it."""
    what = [flatten(module.source), module.kernels, module.defines, sorted(_OPTIONS.items()), arch, compiler_version()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def compile_module(module: Module, arch: str) -> Binary:
    """Compiles, or takes from the cache on disk.

    Raises:
        CompilerUnavailableError: no NVRTC, or one that cannot compile for this architecture.
    """
    name = key(module, arch)
    kept = cache.load(name)
    if kept is not None:
        return Binary.from_bytes(kept)
    binary = _compile(module, arch)
    cache.store(name, binary.to_bytes())
    return binary


def _compile(module: Module, arch: str) -> Binary:
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    _, known = nvrtc.nvrtcGetSupportedArchs()[:2]
    if int(re.sub(r"\D", "", arch)) not in known:
        raise CompilerUnavailableError(f"NVRTC {compiler_version()} does not know {arch}: install a newer PyTorch")
    options = ProgramOptions(name=module.source, arch=arch, define_macro=list(module.defines) or None, **_OPTIONS)
    log = io.StringIO()
    program = Program(flatten(module.source), "c++", options)
    try:
        code = program.compile("cubin", name_expressions=module.kernels, logs=log)
        symbols = {name: _text(symbol) for name, symbol in code.symbol_mapping.items()}
        return Binary(cubin=bytes(code.code), symbols=symbols, log=log.getvalue().strip("\0\n"))
    finally:
        program.close()


def _text(symbol: str | bytes) -> str:
    return symbol.decode() if isinstance(symbol, bytes) else symbol


_lock = threading.Lock()
_loaded: dict[tuple[Module, str], dict[str, Kernel]] = {}


def kernels(module: Module, capability: tuple[int, int]) -> dict[str, Kernel]:
    """The kernels of a module by C++ name, compiled and loaded once a process: they run on every GPU of this kind.

    Raises:
        CompilerUnavailableError: no NVRTC, or one that cannot compile for this GPU.
    """
    arch = architecture(capability)
    with _lock:
        found = _loaded.get((module, arch))
        if found is None:
            compiler_version()
            from cuda.core import ObjectCode

            binary = compile_module(module, arch)
            code = ObjectCode.from_cubin(binary.cubin, name=module.source)
            found = _loaded[module, arch] = {name: code.get_kernel(symbol) for name, symbol in binary.symbols.items()}
        return found

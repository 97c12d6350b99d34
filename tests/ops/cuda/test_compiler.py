"""Every shipped kernel compiles for its architectures with no GPU present, with few or no spills; and the cache."""

import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from elman.ops.backends import shipped_modules
from elman.ops.cells import CELLS
from elman.ops.cuda import cache, compiler
from elman.ops.cuda.compiler import CompilerUnavailableError, Module
from tests.ops.cuda.processes import start_together

ROOT = Path(__file__).parents[3]
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a"]
#: Sources ask only whether there is what sm_80 brought: for the generations between, one number type stands for all.
#: The two have the same instructions and registers (ptxas reports the same of every module), so a source's modules are
#: compiled for them by turns, and its first for both.
BETWEEN = ["sm_86", "sm_89"]
MODULE = Module("steps.cuh", ("step_forward<Tanh, float, 1>",))


def missing() -> str:
    """Why kernels cannot be compiled here; empty where they can."""
    try:
        compiler.compiler_version()
    except CompilerUnavailableError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(missing()), reason=missing())


def check_static_claims(monkeypatch: pytest.MonkeyPatch, source: str, claims: list[str], term: str) -> None:
    """Has NVRTC check static_asserts on a source, and checks that it does: with 16 more than ``term`` they fail."""
    module, text = Module(source, ()), compiler.flatten(source) + "\n".join(claims)
    monkeypatch.setattr(compiler, "flatten", lambda source: text)
    compiler._compile(module, "sm_90a")
    name, operator = term.split()
    monkeypatch.setattr(compiler, "flatten", lambda source: text.replace(term, f"{name} + 16 {operator}"))
    with pytest.raises(Exception, match="static assertion failed"):
        compiler._compile(module, "sm_90a")


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_warned", False)
    return tmp_path / "kernels"


def compilations() -> list[tuple[Module, str]]:
    """Every shipped module for its architectures, or where it has none of its own for all; see ``BETWEEN``."""
    found, standing_in = [], Counter[str]()
    for module in shipped_modules():
        archs = list(module.architectures or ARCHITECTURES)
        if not module.architectures:
            number = standing_in[module.source]
            between = [] if "bf16" not in module.kernels[0] else [BETWEEN[number % 2]] if number else BETWEEN
            standing_in[module.source] += len(between) > 0
            archs = [arch for arch in archs if arch not in BETWEEN or arch in between]
        found += [(module, arch) for arch in archs]
    return found


def test_each_generation_is_compiled_for() -> None:
    """Each module for sm_80 and sm_90a and, of one number type, for one of those between; each source for them all."""
    compiled = compilations()
    shipped = {(module, arch) for module in shipped_modules() for arch in module.architectures}
    assert shipped <= set(compiled)
    general = [(module, arch) for module, arch in compiled if not module.architectures]
    sources = {module.source for module, _ in general}
    assert {(module.source, arch) for module, arch in general} == {(s, arch) for s in sources for arch in ARCHITECTURES}
    for archs, modules in (
        (("sm_80",), [m for m in shipped_modules() if not m.architectures]),
        (("sm_90a",), [m for m in shipped_modules() if not m.architectures]),
        (tuple(BETWEEN), [m for m in shipped_modules() if not m.architectures and "bf16" in m.kernels[0]]),
    ):
        assert {module for module, arch in general if arch in archs} == set(modules)


def test_sources_ask_for_no_generation_between() -> None:
    """What lets one number type stand for all there."""
    folder = Path(compiler.__file__).parent
    asked = {
        int(n) for path in folder.glob("*.cuh") for n in re.findall(r"__CUDA_ARCH__ *[<>=]+ *(\d+)", path.read_text())
    }
    assert asked
    assert not any(800 < number < 900 for number in asked), asked


@needs_nvrtc
@pytest.mark.parametrize(
    ("module", "arch"),
    compilations(),
    ids=lambda value: value.kernels[0] if isinstance(value, Module) else value,
)
def test_every_kernel_compiles_within_its_spill_limit(module: Module, arch: str) -> None:
    assert_compiles(module, arch)


def assert_compiles(module: Module, arch: str) -> None:
    """Without a warning, nor more spills than the module may have."""
    binary = compiler.compile_module(module, arch)
    assert binary.cubin.startswith(b"\x7fELF")
    assert "warning" not in binary.log
    assert "C75" not in binary.log  # wgmma that ptxas has made wait for each other
    reports = binary.resources()
    assert reports.keys() == set(module.kernels)
    for name, report in reports.items():
        assert max(report.spill_stores, report.spill_loads) <= module.spill_limit, (name, report)
        assert 0 < report.registers <= 255, (name, report)


@needs_nvrtc
def test_the_spill_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 live numbers in 32 registers: ptxas must spill, and its report must say so."""
    source = """
    __global__ void __launch_bounds__(1024, 2) crowd(float* x) {
        float y[128];
        for (int i = 0; i < 128; ++i) y[i] = x[i * blockDim.x + threadIdx.x];
        for (int i = 0; i < 128; ++i) for (int j = 0; j < 128; ++j) y[i] += y[j] * y[(i + j) % 128];
        for (int i = 0; i < 128; ++i) x[i * blockDim.x + threadIdx.x] = y[i];
    }"""
    monkeypatch.setattr(compiler, "flatten", lambda name: source)
    report = compiler.compile_module(Module("crowd.cuh", ("crowd",)), "sm_90a").resources()["crowd"]
    assert report.spill_stores > 0
    assert report.spill_loads > 0


@needs_nvrtc
def test_a_second_process_compiles_nothing(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiler.compile_module(MODULE, "sm_80")
    monkeypatch.setattr(compiler, "_compile", None)
    assert compiler.compile_module(MODULE, "sm_80") == compiled
    assert [path.name for path in fresh_cache.iterdir()] == [compiler.key(MODULE, "sm_80")]


@needs_nvrtc
def test_a_corrupt_entry_is_compiled_again(fresh_cache: Path) -> None:
    compiled = compiler.compile_module(MODULE, "sm_80")
    entry = fresh_cache / compiler.key(MODULE, "sm_80")
    entry.write_bytes(entry.read_bytes()[:-1])
    again = compiler.compile_module(MODULE, "sm_80")
    assert again.symbols == compiled.symbols
    assert cache.load(entry.name) == again.to_bytes()


@needs_nvrtc
def test_processes_that_start_together(fresh_cache: Path) -> None:
    code = f"assert compile_module(Module('steps.cuh', {MODULE.kernels!r}), 'sm_80').cubin.startswith(b'\\x7fELF')"
    processes = start_together("from elman.ops.cuda.compiler import Module, compile_module", code, 4)
    assert processes.wait() == 0
    assert [path.name for path in fresh_cache.iterdir()] == [compiler.key(MODULE, "sm_80")]


@needs_nvrtc
def test_without_a_cache_it_compiles_all_the_same(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMAN_CACHE", "off")
    assert compiler.compile_module(MODULE, "sm_80").cubin
    assert not fresh_cache.exists()


@needs_nvrtc
def test_what_a_training_run_needs_compiles_in_seconds() -> None:
    """Issue's bar: 10 s cold. One cell in one dtype is what a run uses."""
    start = time.perf_counter()
    for module in shipped_modules():
        if any("Tanh, bf16" in kernel for kernel in module.kernels):
            compiler.compile_module(module, "sm_90a")
    assert time.perf_counter() - start < 10


@needs_nvrtc
def test_the_key_holds_everything_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        compiler.key(MODULE, "sm_80"),
        compiler.key(MODULE, "sm_86"),
        compiler.key(replace(MODULE, kernels=("step_forward<Tanh, float, 4>",)), "sm_80"),
        compiler.key(replace(MODULE, defines=(("TILE", "64"),)), "sm_80"),
    ]
    monkeypatch.setitem(compiler._OPTIONS, "std", "c++20")
    keys.append(compiler.key(MODULE, "sm_80"))
    monkeypatch.setattr(compiler, "compiler_version", lambda: "99.0")
    keys.append(compiler.key(MODULE, "sm_80"))
    text = compiler.flatten("steps.cuh")
    monkeypatch.setattr(compiler, "flatten", lambda source: text.replace("Real(4)", "Real(5)"))  # an included file's
    keys.append(compiler.key(MODULE, "sm_80"))
    assert len(set(keys)) == len(keys)


@needs_nvrtc
def test_each_include_is_taken_once_and_keeps_its_lines() -> None:
    text = compiler.flatten("steps.cuh")
    assert text.count("struct Tanh") == 1
    assert "#include" not in text
    assert '#line 1 "cells.cuh"' in text


@needs_nvrtc
def test_twins_agree_on_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell in Python and its functor have as many gates, products, states and saved values."""
    claims = [
        f'static_assert({cell.functor}::{constant} == {int(value)}, "{name}");'
        for name, cell in CELLS.items()
        if cell.functor is not None
        for constant, value in (
            ("kGates", cell.gates),
            ("kProducts", cell.products),
            ("kStates", cell.states),
            ("kSaved", cell.saved),
            ("kReadsMemory", cell.reads_memory),
            ("kAdditive", cell.additive),
            ("kLogarithmic", cell.logarithmic),
        )
    ]
    text = compiler.flatten("cells.cuh") + "\n".join(claims)
    monkeypatch.setattr(compiler, "flatten", lambda source: text)
    compiler.compile_module(Module("cells.cuh", ()), "sm_80")
    text = text.replace("Lstm::kStates == 2", "Lstm::kStates == 1")
    with pytest.raises(Exception, match="static assertion failed"):
        compiler.compile_module(Module("cells.cuh", ()), "sm_80")


@needs_nvrtc
def test_an_error_names_the_file_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = compiler.flatten("steps.cuh").replace(
        "struct Tanh : Additive<Tanh> {", "struct Tanh : Additive<Tanh> { oops;"
    )
    monkeypatch.setattr(compiler, "flatten", lambda source: text)
    with pytest.raises(Exception, match=r"cells\.cuh\(\d+\)"):
        compiler.compile_module(MODULE, "sm_80")


@needs_nvrtc
def test_an_architecture_that_nvrtc_does_not_know() -> None:
    with pytest.raises(CompilerUnavailableError, match="does not know sm_999: install a newer PyTorch"):
        compiler.compile_module(MODULE, "sm_999")


def test_without_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.compiler_version.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(CompilerUnavailableError, match="pip install cuda-core"):
        compiler.compiler_version()


def test_import_elman_leaves_cuda_core_alone() -> None:
    code = "import elman.ops, sys; assert 'cuda.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a")]
)
def test_architecture_of_a_gpu(capability: tuple[int, int], arch: str) -> None:
    assert compiler.architecture(capability) == arch

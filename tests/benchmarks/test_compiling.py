"""Compiling ahead fills the cache, once."""

from pathlib import Path

import pytest

from benchmarks.compiling import compile_ahead
from elman.ops.cuda import cache, compiler
from elman.ops.cuda.compiler import Module
from tests.ops.cuda.test_compiler import needs_nvrtc

MODULES = [Module("steps.cuh", (f"step_forward<Tanh, float, {width}>",)) for width in (1, 2)]


@needs_nvrtc
def test_other_processes_fill_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path))
    assert compile_ahead([*MODULES, MODULES[0]], "sm_80") == 2
    assert all(cache.load(compiler.key(module, "sm_80")) for module in MODULES)
    assert compile_ahead(MODULES, "sm_80") == 0
    monkeypatch.setenv("ELMAN_CACHE", "off")
    assert compile_ahead(MODULES, "sm_80") == 0

"""Compiles many kernels at once. NVRTC does one after another in a process, so every core has a process of its own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from elman.ops.cuda import cache
from elman.ops.cuda.compiler import Module, compile_module, key

_MOST_PROCESSES = 16


def compile_ahead(modules: Iterable[Module], arch: str) -> int:
    """Fills the cache on disk with what it lacks of these, and returns their number; 0 where there is no cache."""
    if cache.kernel_folder() is None:
        return 0
    wanted = [module for module in dict.fromkeys(modules) if cache.load(key(module, arch)) is None]
    if wanted:
        processes = min(len(os.sched_getaffinity(0)), len(wanted), _MOST_PROCESSES)
        # Not forked: this process may have a CUDA context.
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_keep, wanted, itertools.repeat(arch)))
    return len(wanted)


def _keep(module: Module, arch: str) -> None:
    compile_module(module, arch)

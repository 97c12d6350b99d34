"""Shared fixtures; tests marked ``gpu`` are skipped where no CUDA device is there."""

import os

# Before torch is imported: processes that share the cores would wait for each other's threads, and so would their own.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
# Which vectors this CPU has, torch.compile finds out in every process, by compiling and by starting Python four times.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def brief_endings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests that look at a run's sample and picture get all of them."""
    if "whole_endings" not in request.keywords:
        from tests.endings import make_brief

        make_brief(monkeypatch.setattr)

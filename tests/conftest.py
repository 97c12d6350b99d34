"""Shared fixtures; tests marked ``gpu`` are skipped where no CUDA device is there."""

import os

# Before torch is imported: processes that share the cores would wait for each other's threads, and so would their own.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

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
    """What a run leaves at its end takes longer than a toy run itself: only tests that look at it get all of it."""
    if "whole_endings" in request.keywords:
        return
    monkeypatch.setattr("elman.training.finish._SAMPLE_BYTES", 8)
    monkeypatch.setattr("elman.training.finish.plot_losses", lambda rows, title, path, unit: path.touch())

"""What the driver is asked for at a launch, by stand-ins for it, without a GPU."""

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from elman.ops.cuda import launch as module
from elman.ops.cuda.compiler import Module
from elman.ops.cuda.launch import launch

core = pytest.importorskip("cuda.core")
driver = pytest.importorskip("cuda.bindings.driver")

ONE, OTHER = Module("one.cuh", ("one", "two")), Module("other.cuh", ("one",))
DEVICE = torch.device("cuda", 3)
LIMIT, STATIC = 10_000, 16
SHARED = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTERS = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


@dataclass
class Seen:
    """Launches as (kernel, configuration, arguments), and the attributes of kernels by (kernel, attribute)."""

    launches: list[tuple[object, object, tuple[object, ...]]] = field(default_factory=list)
    attributes: dict[tuple[object, object], int] = field(default_factory=dict)
    refused: object = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    seen = Seen()
    current = []

    def queue(stream: object, config: object, kernel: types.SimpleNamespace, *arguments: object) -> None:
        assert (stream, current) == (5, [3])
        seen.launches.append((kernel.handle, config, arguments))

    def set_attribute(attribute: object, value: int, kernel: object, device: object) -> tuple[object]:
        assert int(device) == 3
        seen.attributes[kernel, attribute] = value
        return (seen.refused,)

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    properties = types.SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=LIMIT)
    monkeypatch.setattr(
        module,
        "kernels",
        lambda of, capability: {
            name: types.SimpleNamespace(handle=f"{of.source} {name} {capability}") for name in of.kernels
        },
    )
    monkeypatch.setattr(core, "launch", queue)
    monkeypatch.setattr(core, "LaunchConfig", dict)  # the true one asks the driver whether it knows clusters
    monkeypatch.setattr(core, "Device", lambda index: types.SimpleNamespace(set_current=lambda: None))
    monkeypatch.setattr(core, "Stream", types.SimpleNamespace(from_handle=lambda handle: handle))
    monkeypatch.setattr(driver, "cuKernelSetAttribute", set_attribute)
    monkeypatch.setattr(driver, "cuKernelGetAttribute", lambda *args: (0, STATIC))
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    module._kernel.cache_clear()
    yield seen
    module._kernel.cache_clear()


def test_a_launch_says_what_it_is_told(seen: Seen) -> None:
    x = torch.zeros(3)
    launch(ONE, "two", 6, 64, [x, None, -2, 0.5, 0], DEVICE)
    launch(OTHER, "one", 6, 64, [], DEVICE, shared_bytes=1000, cluster=2)
    launch(ONE, "one", 6, 64, [], DEVICE, cooperative=True)
    assert [handle for handle, _, _ in seen.launches] == [
        "one.cuh two (9, 0)",
        "other.cuh one (9, 0)",
        "one.cuh one (9, 0)",
    ]
    none = {"cluster": None, "shmem_size": 0, "is_cooperative": False}
    assert [config for _, config, _ in seen.launches] == [
        {**none, "grid": 6, "block": 64},
        {**none, "grid": 3, "block": 64, "cluster": 2, "shmem_size": 1000},
        {**none, "grid": 6, "block": 64, "is_cooperative": True},
    ]
    assert seen.launches[0][2] == (x.data_ptr(), 0, -2, 0.5, 0)
    assert [type(argument) for argument in seen.launches[0][2]] == [np.int64] * 3 + [np.float64, np.int64]


def test_a_kernel_may_use_all_shared_memory_whatever_the_first_or_last_launch_wants(seen: Seen) -> None:
    for shared_bytes in (9000, 100, 5000):
        launch(ONE, "one", 1, 32, [], DEVICE, shared_bytes=shared_bytes)
        assert seen.attributes == {("one.cuh one (9, 0)", SHARED): LIMIT - STATIC}
    launch(ONE, "two", 2, 32, [], DEVICE, cluster=2)
    assert seen.attributes.keys() == {("one.cuh one (9, 0)", SHARED), ("one.cuh two (9, 0)", CLUSTERS)}


def test_what_the_driver_refuses_is_an_error(seen: Seen) -> None:
    seen.refused = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match=f"cannot prepare one: CUDA_ERROR_INVALID_VALUE for .* = {LIMIT - STATIC}"):
        launch(ONE, "one", 1, 32, [], DEVICE, shared_bytes=10)
    assert not seen.launches

"""What the driver is handed at a launch; a stand-in for it reads the structures, without a GPU."""

import ctypes
import types

import pytest
import torch

from elman.ops.cuda.launch import launch

driver = pytest.importorskip("cuda.bindings.driver")

KERNEL = types.SimpleNamespace(handle=7)
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The launches so far, as their kernels would see them: arguments of 8 bytes but for an int32 at the end."""
    found: list[dict[str, object]] = []

    def run(config: object, function: object, pointers: int, extra: int) -> tuple[object]:
        at = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
        attributes = [(a.id.name, bytes(a.value.pad)) for a in config.attrs[: config.numAttrs]]
        size = (config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX, config.blockDimY, config.blockDimZ)
        first, second = (ctypes.c_int64.from_address(at[i]).value for i in range(2))
        third = ctypes.c_int32.from_address(at[2]).value
        given = (int(function), extra, config.sharedMemBytes, int(config.hStream))
        found.append({"size": size, "attributes": attributes, "given": given, "arguments": (first, second, third)})
        return (driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(driver, "cuLaunchKernelEx", run)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=5))
    return found


def words(*numbers: int) -> bytes:
    """A launch attribute's value: 64 bytes, zero beyond what is set."""
    return b"".join(n.to_bytes(4, "little") for n in numbers).ljust(64, b"\0")


def test_a_launch_says_what_it_is_told(launched: list[dict[str, object]]) -> None:
    x = torch.zeros(3)
    launch(KERNEL, 6, 64, [x, None, -2], DEVICE)
    launch(KERNEL, 6, 64, [x, None, 9], DEVICE, shared_bytes=1000, cluster=2)
    launch(KERNEL, 6, 64, [x, None, 9], DEVICE, cooperative=True)
    assert [one["size"] for one in launched] == [(6, 1, 1, 64, 1, 1)] * 3
    assert [one["given"] for one in launched] == [(7, 0, 0, 5), (7, 0, 1000, 5), (7, 0, 0, 5)]
    assert [one["arguments"] for one in launched] == [(x.data_ptr(), 0, n) for n in (-2, 9, 9)]
    assert [one["attributes"] for one in launched] == [
        [],
        [("CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION", words(2, 1, 1))],
        [("CU_LAUNCH_ATTRIBUTE_COOPERATIVE", words(1))],
    ]


def test_a_failed_launch_is_an_error(launched: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "cuLaunchKernelEx", lambda *args: (driver.CUresult.CUDA_ERROR_INVALID_VALUE,))
    with pytest.raises(RuntimeError, match="6 blocks in clusters of 2: CUDA_ERROR_INVALID_VALUE"):
        launch(KERNEL, 6, 64, [0, 0, 0], DEVICE, cluster=2)

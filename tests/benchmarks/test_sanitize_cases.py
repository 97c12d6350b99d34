"""What is recorded for the tools, on a stand-in for the GPU: every family, every design, small."""

import itertools
import math
import re
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.sanitize import __main__ as driver_mode
from benchmarks.sanitize import cases, control, record, replay
from benchmarks.sanitize.launches import Launch, Place
from elman.ops import gated_softmax, loop, norm, persistent, scan
from elman.ops.cells import FUSED_CELLS
from elman.ops.cuda.compiler import Binary, CompilerUnavailableError, compile_module, compiler_version
from tests.ops.test_persistent import H200

driver = pytest.importorskip("cuda.bindings.driver")
core = pytest.importorskip("cuda.core")


@pytest.fixture(scope="module")
def recorded() -> record.Recorder:
    """All cases, on a GPU whose kernels do nothing and whose memory is the CPU's."""
    names = dict(
        enumerate(
            name for cell in FUSED_CELLS for dtype in cases.DTYPES for name in loop.step_module(cell, dtype).kernels
        )
    )
    kernels = {name: types.SimpleNamespace(handle=number) for number, name in names.items()}
    recorder = record.Recorder(lambda *args, **options: None, lambda module: Binary(b"", record._AnyName(), ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(persistent, "chip_of", lambda index: H200)
        patch.setattr(cases.matrix_kernels, "_shared_bytes", lambda index: H200.shared_bytes)
        patch.setattr(cases.banks, "_has_kernel", lambda h, decay: True)
        patch.setattr(cases.short_conv, "_has_kernel", lambda u, weight: True)
        patch.setattr(scan, "_has_kernel", lambda h: True)
        patch.setattr(norm, "_blocks", lambda direction, x: 2)
        patch.setattr(gated_softmax, "_turns", lambda tiles, device: 2)
        patch.setattr(loop, "kernels", lambda module, capability: kernels)
        patch.setattr(loop, "_steps", loop._KernelSteps)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
        patch.setattr(core, "Device", lambda index: types.SimpleNamespace(set_current=lambda: None))
        patch.setattr(driver, "cuLaunchKernel", lambda *args: (driver.CUresult.CUDA_SUCCESS,))
        record.record(cases.cases(H200), recorder, "cpu")
    return recorder


def test_every_family_is_recorded_and_comes_early(recorded: record.Recorder) -> None:
    families = [launch.family for launch in recorded.launches]
    assert set(families[:34]) == set(families) == set(driver_mode._FAMILIES.values())
    assert tuple(families[:2]) == driver_mode.CONTROLS
    assert min(number for family, number in Counter(families).items() if family not in driver_mode.CONTROLS) >= 10
    for launch in recorded.launches:
        assert next(family for name, family in driver_mode._FAMILIES.items() if name in launch.symbol) == launch.family
    names = " ".join(launch.symbol for launch in recorded.launches)
    for cell in FUSED_CELLS.values():
        for number in ("bf16", "fp16"):
            for exchange in cases.EXCHANGES:
                for direction in ("forward", "backward"):
                    assert any(
                        f"persistent_{direction}<{number}, {cell.functor}," in launch.symbol
                        and f"{exchange}>" in launch.symbol
                        for launch in recorded.launches
                    ), (cell, number, exchange, direction)
            assert f"step_backward<{cell.functor}, {number}" in names
            assert f"diagonal_backward<{cell.functor}, {number}" in names
    for number in ("bf16, 1", "bf16, 2", "fp16, 2", "float, 1", "double, 1"):
        assert f"scan_forward<{number}>" in names
        assert f"scan_backward<{number}>" in names


def test_nothing_is_compared_with_a_race(recorded: record.Recorder) -> None:
    for launch in recorded.launches:
        if launch.family in driver_mode.CONTROLS:
            (sums,) = launch.buffers
            assert (sums.after is None) == ("racing" in launch.family)
            assert launch.threads == len(sums.before) // 2
            assert launch.shared_bytes % len(sums.before) == 0


def test_the_control_kernels_compile() -> None:
    try:
        compiler_version()
    except CompilerUnavailableError as error:
        pytest.skip(str(error))
    for family in driver_mode.CONTROLS:
        name = next(name for name, of in driver_mode._FAMILIES.items() if of == family)
        binary = compile_module(control._module(name), "sm_90a")
        assert len(binary.symbols) == len(control.SIZES)
        assert all(name in symbol for symbol in binary.symbols.values())


def test_grids_are_small_but_ctas_have_others_to_wait_for(recorded: record.Recorder) -> None:
    seen = Counter()
    for launch in recorded.launches:
        if launch.family.startswith("persistent"):
            *_, shared_units, blocks, _ = launch.symbol.split("<")[1].split(", ")
            tiles = launch.arguments[-1]
            assert launch.grid[0] <= 16
            assert launch.grid[0] >= 2
            assert launch.cluster is None or 2 <= launch.cluster <= launch.grid[0]
            assert launch.cooperative == (launch.cluster is None)
            assert 0 < launch.shared_bytes <= H200.shared_bytes
            seen[launch.family, "tiles", tiles] += 1
            seen[launch.family, "blocks", blocks] += 1
            seen[launch.family, "shared", int(shared_units) > 0] += 1
    for exchange, tiles in cases._TILES.items():
        assert seen[f"persistent {exchange}", "tiles", tiles] >= 2 * 2 * len(FUSED_CELLS)
        assert seen[f"persistent {exchange}", "tiles", 1] > 0
        assert seen[f"persistent {exchange}", "blocks", "2"] == 4
        assert seen[f"persistent {exchange}", "shared", True] == 4


class HopperLaunch(NamedTuple):
    """Of a wide or a split kernel; ``split`` is the CTAs of a cluster of the latter."""

    launch: Launch
    name: str
    number: str
    cell: str
    in_registers: int
    in_shared: int
    blocks: int
    slots: int
    split: int
    rooms: int = 2

    @property
    def chunks(self) -> int:
        return self.in_registers + self.in_shared


def hopper_launches(recorded: record.Recorder, family: str) -> Iterator[HopperLaunch]:
    """Having checked what all of them have in common."""
    for launch in recorded.launches:
        if launch.family == family:
            name, number, cell, *sizes = re.split(r"[<>, ]+", launch.symbol)[:-1]
            backward = name == f"{family}_backward"
            h0, reset = launch.arguments[10 if backward else 3], launch.arguments[4 if backward else 5]
            assert isinstance(h0, Place) == isinstance(reset, Place) == ("neither" not in launch.words)
            assert launch.arguments[-4] % 2 == 1
            assert 0 < launch.shared_bytes <= H200.shared_bytes
            assert launch.cooperative
            yield HopperLaunch(launch, name, number, cell, *map(int, sizes))


def assert_has_all_problems(seen: Counter[object], family: str, splits: Sequence[int]) -> None:
    """Of every design both ways; ``seen`` is with the numbers, cells, tiles and slots, and with words."""
    for name, split in itertools.product((f"{family}_forward", f"{family}_backward"), splits):
        for number, cell in itertools.product(("bf16", "fp16"), ("Tanh", "Softsign")):
            assert seen[name, split, number, cell, True, False]
            assert seen[name, split, number, cell, True, True]
        assert seen[name, split, "bf16", "Tanh", False, False]
        for what in (*(f"T = {n}" for n in (1, 3, 4, 5)), "bare True", "bare False", "heads 2"):
            assert seen[name, split, what], (name, split, what)


def test_every_design_of_the_wide_kernels_is_there(recorded: record.Recorder) -> None:
    seen: Counter[object] = Counter()
    for one in hopper_launches(recorded, "wide"):
        launch, in_shared = one.launch, one.in_shared > 0
        seq_len, _, hidden, pitch, tiles = launch.arguments[-5:]
        given_back = one.slots < one.chunks
        assert math.ceil(hidden / 64) % 2 == 0
        assert 2 <= launch.grid[0] <= (18 if in_shared else 14 if given_back else 8)
        assert launch.cluster is None
        assert given_back == ("given back" in launch.words) or in_shared
        assert in_shared == ("in shared memory" in launch.words)
        seen[one.name, one.split, one.number, one.cell, tiles > 1, given_back] += 1
        bare = "neither" in launch.words
        for what in (f"T = {seq_len}", f"bare {bare}", f"heads {pitch // hidden}", f"in shared {in_shared}"):
            seen[one.name, one.split, what] += 1
    assert_has_all_problems(seen, "wide", (1, 2))
    for name, split in itertools.product(("wide_forward", "wide_backward"), (1, 2)):
        assert seen[name, split, "in shared True"]


def test_every_design_of_the_split_kernels_is_there(recorded: record.Recorder) -> None:
    seen: Counter[object] = Counter()
    for one in hopper_launches(recorded, "split"):
        launch, cluster = one.launch, one.split
        seq_len, _, hidden, pitch, tiles = launch.arguments[-5:]
        owners = math.ceil(hidden / 128)  # clusters of a group; as many chunks
        given_back = one.slots < 2 * one.chunks
        assert launch.cluster == cluster
        assert launch.threads == 512
        assert cluster <= owners
        assert one.chunks == math.ceil(owners / cluster)
        assert launch.grid[0] % (owners * cluster) == 0
        assert launch.grid[0] <= 32
        assert one.slots % one.chunks > 0 if given_back else one.slots == 2 * one.chunks
        assert given_back == ("given back" in launch.words)
        assert (one.in_shared > 0) == ("in shared memory" in launch.words)
        seen[one.name, cluster, one.number, one.cell, tiles > 1, given_back] += 1
        bare = "neither" in launch.words
        whats = f"T = {seq_len}", f"bare {bare}", f"heads {pitch // hidden}", f"blocks {one.blocks}"
        for what in (*whats, f"uneven {owners % cluster > 0}", f"in shared {one.in_shared > 0} {given_back}"):
            seen[one.name, cluster, what] += 1
        seen[one.name, cluster, f"fewer slots than chunks {one.slots < one.chunks}"] += 1
        seen[one.name, cluster, f"rooms {one.rooms}"] += 1
        seen[one.name, cluster, f"groups {launch.grid[0] // (owners * cluster * (pitch // hidden))}"] += 1
    assert_has_all_problems(seen, "split", (2, 4))
    for name in ("split_forward", "split_backward"):
        for cluster in (2, 4):
            for what in ("uneven True", "uneven False", "groups 1", "groups 2"):
                assert seen[name, cluster, what], (name, cluster, what)
        # Over 2, cells have no registers for tiles of 8 blocks; over 4, weights in shared memory take 68 CTAs.
        assert seen[name, 4, "blocks 8"]
        assert seen[name, 4, "rooms 1"]
        for what in ("blocks 5", "in shared True False", "in shared True True", "fewer slots than chunks True"):
            assert seen[name, 2, what], (name, what)


def test_low_rank_has_more_than_one_cta_and_every_place_of_weights(recorded: record.Recorder) -> None:
    seen = Counter()
    for launch in recorded.launches:
        if launch.family == "low_rank":
            name, number, cell, *sizes = re.split(r"[<>, ]+", launch.symbol)[:-1]
            _, _, in_shared, _, _, rank_in_shared, blocks = map(int, sizes[:-1])
            assert 2 <= launch.grid[0] <= 16
            assert launch.cooperative
            assert 0 < launch.shared_bytes <= H200.shared_bytes
            seen[name, number, cell] += 1
            for what in (
                ("blocks", blocks),
                ("tiles", launch.arguments[-2]),
                ("shared", in_shared and rank_in_shared),
                sizes[-1],
            ):
                seen[name, what] += 1
    for name in ("low_rank_forward", "low_rank_backward"):
        for cell in FUSED_CELLS.values():
            assert (seen[name, "fp16", cell.functor] > 0) == (cell.products == 1)
        for what in (("blocks", 1), ("blocks", 2), ("tiles", 1), ("tiles", 2), ("tiles", 4), "true", "false"):
            assert seen[name, what]
        assert any(seen[name, ("shared", number)] for number in range(1, 9))


def test_memory_is_recorded_in_its_exact_size(recorded: record.Recorder) -> None:
    launch = next(launch for launch in recorded.launches if "persistent_forward<bf16, Lstm" in launch.symbol)
    seq_len, batch, hidden = launch.arguments[11:14]
    pre, weight, h = (launch.buffers[launch.arguments[place].buffer] for place in (0, 1, 6))
    assert pre.before.nbytes == seq_len * batch * 4 * hidden * 2
    assert weight.before.nbytes == 4 * hidden * hidden * 2
    assert h.written_only
    assert not pre.written_only


def test_a_step_of_the_loop_has_its_own_slices(recorded: record.Recorder) -> None:
    forward = [launch for launch in recorded.launches if launch.symbol == "step_forward<Lstm, bf16, 1>"][:2]
    sizes = [
        [len(launch.buffers[x.buffer].before) if isinstance(x, Place) else x for x in launch.arguments]
        for launch in forward
    ]
    of_states = 3 * 67 * 2
    gates = 4 * of_states
    expected = [gates, 4 * 67, 67, gates, 0, 3, 3, of_states, gates, of_states, of_states, of_states, 67]
    assert sizes[0] == expected
    expected[6] = 0  # no resets follow the last step
    assert [a if not isinstance(b, int) or b else b for a, b in zip(sizes[1], expected, strict=True)] == sizes[1]


def test_a_gpu_is_told_of_clusters_that_run_at_a_time(
    recorded: record.Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = next(launch for launch in recorded.launches if launch.family == "split" and launch.cluster == 4)
    kernels = {launch.symbol: types.SimpleNamespace(handle="handle")}
    binary = types.SimpleNamespace(get_kernel=kernels.get)
    here = types.SimpleNamespace(device_id=0, set_current=lambda: None, create_stream=lambda: "stream")
    told, limits, attributes = [], {}, driver.CUfunction_attribute
    monkeypatch.setattr(core, "Device", lambda index: here)
    monkeypatch.setattr(core, "LaunchConfig", dict)  # the true one asks the driver whether it knows clusters
    monkeypatch.setattr(core, "ObjectCode", types.SimpleNamespace(from_cubin=lambda cubin: binary))
    monkeypatch.setattr(core, "launch", lambda stream, config, kernel, *arguments: told.append((config, arguments)))
    monkeypatch.setattr(driver, "cuCtxSynchronize", lambda: (0,))
    monkeypatch.setattr(driver, "cuKernelSetAttribute", lambda name, value, *of: limits.update({name: value}) or (0,))
    replay.Gpu().run(launch, [np.int64(7)])
    expected = {"cluster": 4, "is_cooperative": True, "block": 512, "shmem_size": launch.shared_bytes}
    assert told == [({"grid": (launch.grid[0] // 4, 1, 1), **expected}, (7,))]
    assert limits == {
        attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: launch.shared_bytes,
        attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: 1,
    }

"""The persistent kernels' own sources on an emulated GPU: every result, by few CTAs, threads in random orders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.designs import SPLIT, WIDE, best_plan
from elman.ops import low_rank, persistent
from elman.ops.cuda.compiler import Module
from elman.ops.cuda.launch import NoRoomError
from elman.ops.low_rank import LowRankPlan
from elman.ops.planning import TYPICAL_CHIPS, Chip, Task
from elman.ops.split import SplitPlan
from elman.ops.wide import WidePlan
from tests.ops.cuda import emulator
from tests.ops.cuda.emulator import emulate, needs_compiler
from tests.ops.problems import Problem, assert_a_nan_stays_in_its_row, assert_as_exact_as_reference, draw, solve

pytestmark = needs_compiler


@dataclass(frozen=True)
class LowRankCase:
    """A problem, and the plan for it: row tiles, rank tiles and blocks, on a GPU of so many multiprocessors."""

    seq_len: int
    batch: int
    hidden: int
    rank: int
    tiles: tuple[int, int, int] = (1, 1, 1)
    multiprocessors: int = 4
    cell: str = "tanh"
    with_h0: bool = True
    reset_rate: float | None = 0.2
    arch: str = "sm_90a"
    ahead: bool = False

    def draw(self) -> Problem:
        return draw(
            *(self.seq_len, self.batch, self.hidden),
            dtype=torch.bfloat16,
            operator="low_rank",
            rank=self.rank,
            cell=self.cell,
            with_h0=self.with_h0,
            reset_rate=self.reset_rate,
        )

    def plan(self, task: Task) -> LowRankPlan:
        chip = replace(TYPICAL_CHIPS[self.arch], multiprocessors=self.multiprocessors)
        hidden, rank = self.hidden + -self.hidden % 8, low_rank.filled(self.rank)
        found = low_rank.plans(chip, self.batch, hidden, rank, task)
        wanted = *self.tiles, self.ahead
        (plan,) = (plan for plan in found if (plan.row_tiles, plan.rank_tiles, plan.blocks, plan.ahead) == wanted)
        return plan

    def emulate(self, patch: pytest.MonkeyPatch) -> emulator.Emulator:
        patch.setattr(persistent, "make_plan", lambda chip, batch, hidden, task, heads, rank: self.plan(task))
        return emulate(patch, TYPICAL_CHIPS[self.arch])


CASES = {
    "one tile": LowRankCase(5, 3, 37, 10),
    "two tiles, the second of one row": LowRankCase(11, 9, 40, 10),
    "five tiles, more steps than slots": LowRankCase(19, 37, 24, 9, multiprocessors=2),
    "three tiles, ahead": LowRankCase(12, 20, 40, 10, ahead=True),
    "four tiles and three, ahead": LowRankCase(12, 49, 24, 8, ahead=True),
    "three blocks and one, ahead, a memory": LowRankCase(5, 33, 40, 10, (1, 1, 2), 3, "delta", ahead=True),
    "nine tiles": LowRankCase(10, 65, 24, 8, multiprocessors=2),
    "nine tiles, ahead": LowRankCase(10, 65, 24, 8, multiprocessors=2, ahead=True),
    "one step": LowRankCase(1, 5, 40, 10),
    "one step of four tiles, ahead": LowRankCase(1, 27, 40, 10, ahead=True),
    "neither h0 nor resets": LowRankCase(6, 9, 40, 10, with_h0=False, reset_rate=None),
    "two groups": LowRankCase(4, 18, 24, 8, multiprocessors=4),
    "two blocks": LowRankCase(5, 21, 40, 10, (1, 1, 2), 3),
    "ranks without units": LowRankCase(12, 9, 16, 40),
    "units without ranks": LowRankCase(12, 9, 64, 8),
    "several row tiles": LowRankCase(4, 9, 96, 40, (3, 2, 1), 2),
    "a memory": LowRankCase(5, 9, 40, 10, cell="delta"),
    "a memory in fp32": LowRankCase(5, 9, 40, 10, (1, 1, 2), 3, cell="log_polynomial"),
    "weights in shared memory": LowRankCase(3, 3, 520, 280, (4, 2, 1), 9, arch="sm_80"),
}


@pytest.mark.parametrize("name", CASES)
def test_low_rank_errs_no_more_than_the_reference(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    gpu = case.emulate(monkeypatch)
    assert_as_exact_as_reference(case.draw(), "persistent")
    assert gpu.kernels == ["low_rank_forward", "low_rank_backward"]
    assert gpu.blocks >= 2


def test_the_cases_are_what_their_names_say() -> None:
    plans = {name: case.plan(Task("backward", persistent.CELLS[case.cell])) for name, case in CASES.items()}
    assert [plan.tiles for plan in plans.values()] == [1, 2, 5, 3, 4, 3, 9, 9, 1, 4, 2, 2, 2, 2, 2, 2, 2, 1, 1]
    assert plans["two groups"].groups == 2
    for name, owned, of in (
        ("ranks without units", "row_tiles", "hidden"),
        ("units without ranks", "rank_tiles", "rank"),
    ):
        assert 16 * getattr(plans[name], owned) * (plans[name].columns - 1) >= getattr(CASES[name], of)
    both = plans["weights in shared memory"]
    assert min(both.register_units, both.shared_units, both.rank_register_units, both.rank_shared_units) > 0


def test_the_order_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["two tiles, the second of one row"]
    gpu, problem = case.emulate(monkeypatch), case.draw()
    first, *others = (solve(problem, "persistent") for _ in range(4))
    assert gpu.seed == 8
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


def test_a_nan_stays_in_its_row_until_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES["two tiles, the second of one row"], reset_rate=0.0)
    case.emulate(monkeypatch)
    assert_a_nan_stays_in_its_row(case.draw(), "persistent")


def break_kernel(patch: pytest.MonkeyPatch, folder: Path, file: str, right: str, wrong: str) -> None:
    """What is built from now on has the wrong words in this file."""
    original = emulator._source
    assert original(file).count(right) == 1
    patch.setattr(
        emulator, "_source", lambda name: original(name).replace(right, wrong) if name == file else original(name)
    )
    patch.setattr(emulator, "_folder", lambda: str(folder))


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("low_rank.cuh", "rank = first + thread", "rank = thread"),
        ("low_rank.cuh", "exchange.wipe(step - 2,", "exchange.wipe(step,"),
        ("low_rank.cuh", "part.tiles / 2, last", "part.tiles, last"),
        ("exchange.cuh", "kSlots = 8", "kSlots = 1"),
        ("persistent_cells.cuh", "exchange.wipe(step - 1,", "exchange.wipe(step + 1,"),
    ],
)
def test_a_broken_kernel_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, right: str, wrong: str
) -> None:
    break_kernel(monkeypatch, tmp_path, file, right, wrong)
    case = CASES["two tiles, the second of one row"]
    case.emulate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_as_exact_as_reference(case.draw(), "persistent")


@pytest.mark.parametrize(
    ("exchange", "blocks", "cell", "batch", "heads"),
    [
        ("PolledRing", 1, "tanh", 9, 1),
        ("PolledRing", 2, "triple_r", 21, 1),
        ("StagedRing2", 1, "gru", 29, 1),
        ("StagedRing2", 2, "lstm", 37, 2),
        ("StagedRing3", 1, "softsign", 43, 2),
        ("ClusterPush", 1, "softsign", 19, 1),
    ],
)
def test_dense_and_heads_err_no_more_than_the_reference(
    monkeypatch: pytest.MonkeyPatch, exchange: str, blocks: int, cell: str, batch: int, heads: int
) -> None:
    chip = replace(TYPICAL_CHIPS["sm_90a"], multiprocessors=3 * heads)
    make_plan: Callable[..., object] = functools.partial(best_plan, exchange, blocks)
    monkeypatch.setattr(persistent, "make_plan", make_plan)
    gpu = emulate(monkeypatch, Chip(chip.capability, chip.multiprocessors, chip.shared_bytes))
    operator = "dense" if heads == 1 else "block_diagonal"
    options = {"operator": operator, "heads": heads, "cell": cell, "with_bias": cell == "gru"}
    assert_as_exact_as_reference(draw(10, batch, 40 * heads, dtype=torch.bfloat16, **options), "persistent")
    assert gpu.kernels == ["persistent_forward", "persistent_backward"]


@dataclass(frozen=True)
class HopperCase:
    """A problem for one of ``WIDE`` or ``SPLIT`` on a GPU of so many multiprocessors.

    ``slots``: fewer than fit; ``shared_chunks``: of the weights, which would all fit into registers.
    """

    seq_len: int
    batch: int
    hidden: int
    design: str
    blocks: int = 2
    multiprocessors: int = 4
    slots: int | None = None
    shared_chunks: int = 0
    rooms: int | None = None
    cell: str = "tanh"
    dtype: torch.dtype = torch.bfloat16
    with_h0: bool = True
    reset_rate: float | None = 0.2

    def draw(self) -> Problem:
        options = {"cell": self.cell, "with_h0": self.with_h0, "reset_rate": self.reset_rate}
        return draw(self.seq_len, self.batch, self.hidden, dtype=self.dtype, **options)

    def plan(self, task: Task) -> WidePlan | SplitPlan:
        chip = replace(TYPICAL_CHIPS["sm_90a"], multiprocessors=self.multiprocessors)
        plan = best_plan(self.design, self.blocks, chip, self.batch, self.hidden, task)
        assert isinstance(plan, WidePlan | SplitPlan)
        if self.rooms and isinstance(plan, SplitPlan):
            plan = replace(plan, rooms=self.rooms)
        return replace(
            plan,
            slots=self.slots or plan.slots,
            register_chunks=plan.register_chunks - self.shared_chunks,
            shared_chunks=plan.shared_chunks + self.shared_chunks,
            shared_bytes=chip.shared_bytes if self.slots or self.shared_chunks else plan.shared_bytes,
        )

    def emulate(self, patch: pytest.MonkeyPatch) -> emulator.Emulator:
        patch.setattr(persistent, "make_plan", lambda chip, batch, hidden, task, heads, rank: self.plan(task))
        return emulate(patch, TYPICAL_CHIPS["sm_90a"])


HOPPER_CASES = {
    "own tiles": HopperCase(11, 19, 200, "wide, own tiles"),
    "own tiles, slots given back": HopperCase(
        3, 33, 400, "wide, own tiles", multiprocessors=8, slots=3, cell="softsign"
    ),
    "own tiles, weights in shared memory": HopperCase(
        3, 35, 264, "wide, own tiles", multiprocessors=6, shared_chunks=1
    ),
    "shared tiles": HopperCase(10, 19, 256, "wide, shared tiles", dtype=torch.float16),
    "shared tiles, weights in shared memory": HopperCase(
        3, 19, 520, "wide, shared tiles", multiprocessors=10, shared_chunks=1
    ),
    "split over 2, one tile": HopperCase(11, 13, 200, "split over 2"),
    "split over 2, three tiles": HopperCase(4, 61, 256, "split over 2", 3, dtype=torch.float16),
    "split over 2, two groups": HopperCase(3, 21, 136, "split over 2", multiprocessors=8, cell="softsign"),
    "split over 2, one step": HopperCase(1, 17, 200, "split over 2", with_h0=False, reset_rate=None),
    "split over 2, slots given back": HopperCase(2, 17, 776, "split over 2", multiprocessors=14, slots=3),
    "split over 2, more slots than a tile needs": HopperCase(2, 17, 392, "split over 2", multiprocessors=8, slots=3),
    "split over 2, weights in shared memory": HopperCase(
        3, 19, 392, "split over 2", multiprocessors=8, shared_chunks=1
    ),
    "split over 4": HopperCase(3, 19, 392, "split over 4", multiprocessors=20),
    "split over 4, large tiles": HopperCase(2, 67, 392, "split over 4", 8, multiprocessors=20),
    "split over 2, one room": HopperCase(4, 61, 256, "split over 2", 3, rooms=1),
    "split over 2, one room, slots given back": HopperCase(
        3, 35, 392, "split over 2", 3, multiprocessors=8, slots=3, rooms=1
    ),
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory is full of NaN until it is written to."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", HOPPER_CASES)
def test_products_by_wgmma_err_no_more_than_the_reference(
    monkeypatch: pytest.MonkeyPatch, poisoned: None, name: str
) -> None:
    case = HOPPER_CASES[name]
    gpu = case.emulate(monkeypatch)
    assert_as_exact_as_reference(case.draw(), "persistent")
    kernel = "wide" if case.design in WIDE else "split"
    assert gpu.kernels == [f"{kernel}_forward", f"{kernel}_backward"]


def test_the_hopper_cases_are_what_their_names_say() -> None:
    plans = {name: case.plan(Task("backward", persistent.CELLS[case.cell])) for name, case in HOPPER_CASES.items()}
    assert [plan.tiles for plan in plans.values()] == [2, 3, 3, 2, 2, 1, 3, 1, 2, 2, 2, 2, 2, 2, 3, 2]
    assert [plan.groups for plan in plans.values()] == [1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    for name, plan in plans.items():
        assert (plan.slots % (plan.register_chunks + plan.shared_chunks) > 0) == ("slots" in name)
    assert {case.design for case in HOPPER_CASES.values()} == {*WIDE, *SPLIT}


def test_the_order_of_threads_changes_no_bit_of_a_split_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(HOPPER_CASES["split over 2, three tiles"], seq_len=3)
    gpu, problem = case.emulate(monkeypatch), case.draw()
    first, *others = (solve(problem, "persistent") for _ in range(3))
    assert gpu.seed == 6
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


@pytest.mark.parametrize(
    ("name", "file", "right", "wrong"),
    [
        ("three", "split.cuh", "wide::suspect(sum)", "false"),
        ("three", "wide_products.cuh", "return all_missing;", "return 0;"),
        ("back", "split.cuh", "if (S::kRelease) wait_for_four", "if (false) wait_for_four"),
        ("large", "split.cuh", "mbarrier_wait<kSpinLimit>(read + room", "(void)(read + room"),
        ("three", "split.cuh", "from < S::kCluster;", "from < S::kCluster - 1;"),
        ("three", "wide_products.cuh", "ring.at(step - 2, tile) + wiped", "ring.at(step, tile) + wiped"),
        ("three", "wide_products.cuh", "mbarrier_wait<kSpinLimit>(seen, phase & 1);", ""),
        ("three", "wide_products.cuh", "data + Place<S>(phase, 0, all).slot * S::kChunkBytes, state", "data, state"),
        ("three", "wide_products.cuh", "Place<S>(phase, threadIdx.x & 31, all).slot * 8", "(threadIdx.x & 31) * 8"),
        ("three", "wide_layout.cuh", "parity = phase / S::kSets & 1", "parity = phase & 1"),
        ("three", "wide_products.cuh", "mbarrier_wait<kSpinLimit>(empty, place.parity ^ 1);", ""),
        ("three", "wide_layout.cuh", "static constexpr int kSteps = 8", "static constexpr int kSteps = 1"),
    ],
)
def test_a_broken_split_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, file: str, right: str, wrong: str
) -> None:
    """With three tiles, whose parts have two rooms, or with large ones."""
    cases = {
        "three": "split over 2, three tiles",
        "large": "split over 4, large tiles",
        "back": "split over 2, more slots than a tile needs",
    }
    case = replace(HOPPER_CASES[cases[name]], dtype=torch.bfloat16)
    break_kernel(monkeypatch, tmp_path, file, right, wrong)
    case.emulate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_as_exact_as_reference(case.draw(), "persistent")


def test_a_plan_that_finds_no_room_gives_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many clusters run at a time is known of few GPUs; one warning tells that it were fewer than that."""
    gpu, refused = emulate(monkeypatch, replace(TYPICAL_CHIPS["sm_90a"], multiprocessors=3)), list[str]()

    def launch(module: Module, name: str, *arguments: Any, **options: Any) -> None:
        if options["cluster"] is not None or options["cooperative"] == forbids_cooperative:
            refused.append(name)
            raise NoRoomError("this GPU does not run 3 blocks at a time")
        gpu(module, name, *arguments, **options)

    monkeypatch.setattr(persistent, "launch", launch)
    monkeypatch.setattr(persistent, "_without_room", set())
    forbids_cooperative = None
    problem = draw(3, 9, 40, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="not run 3 blocks at a time: other plans are taken") as warned:
        assert_as_exact_as_reference(problem, "persistent")
    assert len(warned) == 1
    assert gpu.kernels == ["wide_forward", "wide_backward"]
    before = len(refused)
    assert before >= 2
    assert_as_exact_as_reference(problem, "persistent")
    assert len(refused) == before, "what was refused is not tried again"
    forbids_cooperative = True
    for _ in range(2):
        with pytest.raises(NoRoomError, match="use backend='loop'"):
            solve(problem, "persistent")

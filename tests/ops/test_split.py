"""The kernels that split the depth over a cluster: their plans; tests/ops/test_hopper.py runs them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.split import SHAPES, best_plans
from elman.ops import persistent, split
from elman.ops.cells import CELLS
from elman.ops.cuda import compiler
from elman.ops.cuda.compiler import flatten
from elman.ops.planning import Chip, Task
from elman.ops.split import SplitPlan
from tests.ops.cuda.test_compiler import assert_compiles, check_static_claims, needs_nvrtc

H200 = Chip((9, 0), 132, 227 * 1024)
TASKS = [Task(direction, CELLS[cell]) for cell in ("tanh", "softsign") for direction in ("forward", "backward")]
#: By name: the CTAs of a cluster; a width; the multiprocessors and the shared memory that the GPU is made out to have.
DESIGNS = {
    "two": (2, 640, 132, 227 * 1024),
    "two, several tiles": (2, 640, 10, 227 * 1024),
    "two, slots given back": (2, 2048, 132, 227 * 1024),
    "four": (4, 640, 132, 227 * 1024),
    "four, several tiles": (4, 640, 24, 227 * 1024),
    "four, slots given back": (4, 3584, 132, 227 * 1024),
}


def plans_of(design: str, batch: int, hidden: int, task: Task, heads: int = 1) -> list[SplitPlan]:
    cluster, _, multiprocessors, shared_bytes = DESIGNS[design]
    chip = Chip((9, 0), multiprocessors, shared_bytes)
    return [plan for plan in split.plans(chip, batch, hidden, task, heads) if plan.cluster == cluster]


@settings(deadline=None, derandomize=True)
@given(
    task=st.sampled_from(TASKS),
    batch=st.integers(1, 2000),
    hidden=st.integers(1, 500).map(lambda n: 8 * n),
    heads=st.sampled_from([1, 1, 2, 8]),
)
def test_a_plan_covers_the_problem(task: Task, batch: int, hidden: int, heads: int) -> None:
    for plan in split.plans(H200, batch, hidden, task, heads):
        clusters, rest = divmod(plan.columns, plan.cluster)
        assert rest == 0
        assert clusters * 128 >= hidden > (clusters - 1) * 128
        rows = 8 * plan.blocks * plan.tiles
        assert rows * plan.groups >= batch > rows * (plan.groups - 1)
        assert heads * plan.groups * clusters <= H200.clusters(plan.cluster)
        chunks = plan.register_chunks + plan.shared_chunks
        assert plan.cluster * chunks >= clusters > plan.cluster * (chunks - 1)
        assert clusters >= plan.cluster, "every CTA has a chunk"
        assert plan.rooms == 2 or plan.blocks == 8 or plan.slots > chunks, "one room is for more slots"
        assert plan.slots == 2 * chunks or (3 <= plan.slots < 2 * chunks and plan.slots != chunks)
        assert plan.shared_bytes <= H200.shared_bytes


def test_only_cells_of_one_product_without_memory_on_hopper() -> None:
    def found(chip: Chip = H200, hidden: int = 1280, cell: str = "tanh") -> bool:
        return any(split.plans(chip, 256, hidden, Task("forward", CELLS[cell]), 1))

    assert found()
    assert not found(replace(H200, capability=(8, 0)))
    assert not found(replace(H200, capability=(10, 0)))
    assert not found(hidden=128)
    assert not any(found(cell=cell) for cell in ("delta", "triple_r", "lstm", "gru", "polynomial"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("batch", "hidden", "taken"),
    [(128, 3584, True), (512, 1280, True), (256, 2048, False), (256, 1280, False), (64, 640, False)],
)
def test_it_is_taken_where_it_was_faster(batch: int, hidden: int, taken: bool, task: Task) -> None:
    """Than the others, on a GPU: benchmarks/results/split-nvidia-h200.txt; of one room where two leave few slots."""
    assert any(split.plans(H200, batch, hidden, task, 1))
    plan = persistent.make_plan(H200, batch, hidden, task)
    assert isinstance(plan, SplitPlan) == taken
    if isinstance(plan, SplitPlan):
        assert (plan.rooms, plan.slots) == ((1, 8) if hidden == 3584 else (2, 10))


def test_the_model_of_a_steps_time_against_what_was_measured() -> None:
    """Of every row of the table, the mean of both directions."""
    rows = (Path(__file__).parents[2] / "benchmarks/results/split-nvidia-h200.txt").read_text()
    found = re.findall(
        r"^\| (\d+) × (\d+) \| ([\d, ]+) on (\d+)×(\d+)×(\d+) \|.*?\| ([\d.]+) / ([\d.]+) \|", rows, re.M
    )
    assert len(found) == 16
    for batch, hidden, shape, groups, columns, tiles, forward, backward in found:
        blocks, cluster = (int(number) for number in shape.split(", ")[2::2])
        plans = [
            (task, plan)
            for task in TASKS[:2]
            for plan in split.plans(H200, int(batch), int(hidden), task, 1)
            if (plan.blocks, plan.cluster) == (blocks, cluster)
        ]
        assert {(plan.groups, plan.columns, plan.tiles) for _, plan in plans} == {
            (int(groups), int(columns), int(tiles))
        }
        modelled = [plan.microseconds(task) for task, plan in plans]
        measured = (float(forward) + float(backward)) / 2
        assert sum(modelled) / len(modelled) == pytest.approx(measured, rel=0.12), (batch, hidden, shape)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_each_design_is_what_its_name_says(design: str, direction: str) -> None:
    found = plans_of(design, 100, DESIGNS[design][1], Task(direction, CELLS["tanh"]))
    assert any((plan.slots < 2 * (plan.register_chunks + plan.shared_chunks)) == ("slots" in design) for plan in found)
    assert any((plan.tiles > 1) == ("several" in design) for plan in found) or "slots" in design


@needs_nvrtc
def test_the_shared_memory_is_what_the_kernels_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's sum against the sources' own, for every design, by the compiler."""
    claims = []
    for task in TASKS:
        for design, (_, hidden, *_) in DESIGNS.items():
            for plan in plans_of(design, 100, hidden, task):
                backward = str(task.direction == "backward").lower()
                sizes = re.search(r", (\d.*)>", plan.kernel(task, "bf16"))
                assert sizes is not None
                shape = f"split::Shape<{task.cell.functor}, {backward}, {sizes[1]}>"
                claims.append(f'static_assert({shape}::kSharedBytes == {plan.shared_bytes}, "{plan}");')
    check_static_claims(monkeypatch, "split.cuh", claims, "kSharedBytes ==")


@needs_nvrtc
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("batch", "hidden"), SHAPES)
@pytest.mark.parametrize(("cell", "dtype", "most"), [("tanh", torch.bfloat16, 2), ("softsign", torch.float16, 1)])
def test_the_plans_to_be_timed_compile_without_spills(
    batch: int, hidden: int, cell: str, dtype: torch.dtype, most: int, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for four words a thread at most, which leave registers before the first step: ptxas lacks uniform ones."""
    monkeypatch.setenv("ELMAN_CACHE", "off")
    task = Task(direction, CELLS[cell])
    for plans in best_plans(H200, batch, hidden, most, {direction: task}):
        module = persistent._module(task, dtype, plans[direction])
        assert_compiles(replace(module, spill_limit=16), "sm_90a")


@needs_nvrtc
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("design", DESIGNS)
def test_every_tile_compiles(design: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMAN_CACHE", "off")
    task = Task(direction, CELLS["tanh"])
    for plan in plans_of(design, 100, DESIGNS[design][1], task):
        assert_compiles(persistent._module(task, torch.bfloat16, plan), "sm_90a")


@needs_nvrtc
def test_a_serialised_wgmma_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With too few registers ptxas makes wgmma wait for each other, and says so."""
    text = flatten("split.cuh")
    few = text.replace("kCellBlocks > 4 ? 184 : 192", "168")
    assert few != text
    monkeypatch.setenv("ELMAN_CACHE", "off")
    monkeypatch.setattr(compiler, "flatten", lambda source: few)
    task = Task("forward", CELLS["tanh"])
    (plans,) = best_plans(H200, 128, 3584, 1, {"forward": task})
    module = persistent._module(task, torch.bfloat16, plans["forward"])
    with pytest.raises(AssertionError, match="C75"):
        assert_compiles(replace(module, spill_limit=1000), "sm_90a")


def test_arguments_are_in_the_order_of_the_wide_kernels() -> None:
    split_text, wide_text = flatten("split.cuh"), flatten("wide.cuh")
    for direction in ("forward", "backward"):
        ours, theirs = (
            re.search(rf"{kind}_{direction}\(([^)]*)\)", text)
            for kind, text in (("split", split_text), ("wide", wide_text))
        )
        assert ours is not None
        assert theirs is not None
        assert ours[1].split() == theirs[1].split()

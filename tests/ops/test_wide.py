"""The kernels of large batches: their plans; tests/ops/test_hopper.py runs them."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elman.ops import wide
from elman.ops.cells import CELLS
from elman.ops.cuda.compiler import flatten
from elman.ops.planning import Chip, Task
from elman.ops.wide import WidePlan
from tests.ops.cuda.test_compiler import check_static_claims, needs_nvrtc

H200 = Chip((9, 0), 132, 227 * 1024)
TASKS = [Task(direction, CELLS[cell]) for cell in ("tanh", "softsign") for direction in ("forward", "backward")]

#: By name: the split; the multiprocessors and the shared memory that the GPU is made out to have, so that few CTAs or
#: few slots are left; and a width where that shows.
DESIGNS = {
    "own tiles": (1, 132, 227 * 1024, 640),
    "own tiles, several": (1, 10, 227 * 1024, 640),
    "own tiles, slots given back": (1, 132, 64 * 1024, 640),
    "shared tiles": (2, 132, 227 * 1024, 640),
    "shared tiles, several": (2, 10, 227 * 1024, 640),
    "shared tiles, slots given back": (2, 132, 44 * 1024, 1024),
}


def plans_of(design: str, batch: int, hidden: int, task: Task, heads: int = 1) -> list[WidePlan]:
    split, multiprocessors, shared_bytes, _ = DESIGNS[design]
    chip = Chip((9, 0), multiprocessors, shared_bytes)
    return [plan for plan in wide.plans(chip, batch, hidden, task, heads) if plan.split == split]


@settings(deadline=None, derandomize=True)
@given(
    task=st.sampled_from(TASKS),
    batch=st.integers(1, 2000),
    hidden=st.integers(1, 500).map(lambda n: 8 * n),
    heads=st.sampled_from([1, 1, 2, 8]),
)
def test_a_plan_covers_the_problem(task: Task, batch: int, hidden: int, heads: int) -> None:
    for plan in wide.plans(H200, batch, hidden, task, heads):
        assert plan.columns % 2 == 0
        assert plan.columns * 64 >= hidden > (plan.columns - 2) * 64
        rows = 8 * plan.blocks * plan.tiles
        assert rows * plan.groups >= batch > rows * (plan.groups - 1)
        assert heads * plan.groups * plan.columns <= 132
        assert plan.split * (plan.register_chunks + plan.shared_chunks) in (plan.columns // 2, plan.columns // 2 + 1)
        assert plan.register_chunks >= 1
        assert plan.slots == plan.register_chunks + plan.shared_chunks or plan.slots >= 3
        assert plan.blocks % plan.split == 0
        assert plan.shared_bytes <= H200.shared_bytes


def test_only_cells_of_one_product_without_memory_on_hopper() -> None:
    def found(chip: Chip = H200, hidden: int = 1280, cell: str = "tanh") -> bool:
        return any(wide.plans(chip, 256, hidden, Task("forward", CELLS[cell]), 1))

    assert found()
    assert not found(replace(H200, capability=(8, 0)))
    assert not found(replace(H200, capability=(10, 0)))
    assert found(hidden=1216)
    assert not any(found(cell=cell) for cell in ("delta", "triple_r", "lstm", "gru", "polynomial"))


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_each_design_is_what_its_name_says(design: str, direction: str) -> None:
    found = plans_of(design, 100, DESIGNS[design][-1], Task(direction, CELLS["tanh"]))
    assert any((plan.slots < plan.register_chunks + plan.shared_chunks) == ("slots" in design) for plan in found)
    assert any((plan.tiles > 1) == ("several" in design) for plan in found) or "slots" in design


@needs_nvrtc
def test_the_shared_memory_is_what_the_kernels_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's sum against the sources' own, for every design, by the compiler."""
    claims = []
    for task in TASKS:
        for design in DESIGNS:
            for plan in plans_of(design, 100, 1024, task) + plans_of(design, 100, 640, task):
                backward = str(task.direction == "backward").lower()
                sizes = re.search(r", (\d.*)>", plan.kernel(task, "bf16"))
                assert sizes is not None
                shape = f"wide::Shape<{task.cell.functor}, {backward}, {sizes[1]}>"
                claims.append(f'static_assert({shape}::kSharedBytes == {plan.shared_bytes}, "{plan}");')
    check_static_claims(monkeypatch, "wide.cuh", claims, "kSharedBytes ==")


def test_arguments_are_in_the_order_of_the_other_kernels() -> None:
    """One launch serves both: what a kernel does not use has no name."""
    wide_text, other = flatten("wide.cuh"), flatten("persistent.cuh")
    for direction in ("forward", "backward"):
        ours, theirs = (
            re.search(rf"{kind}_{direction}\(([^)]*)\)", text)
            for kind, text in (("wide", wide_text), ("persistent", other))
        )
        assert ours is not None
        assert theirs is not None
        pairs = list(zip(ours[1].split(","), theirs[1].split(","), strict=True))
        named = [ours.strip() == theirs.strip() for ours, theirs in pairs]
        assert all(same or ours.strip().endswith("*") for same, (ours, _) in zip(named, pairs, strict=True))
        assert sum(named) >= 12

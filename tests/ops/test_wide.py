"""The kernels of large batches: their plans, and on a GPU each of their designs, asked for by name."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elman.ops import persistent, wide
from elman.ops.cells import CELLS
from elman.ops.cuda.compiler import flatten
from elman.ops.planning import Chip, Task
from elman.ops.wide import WidePlan
from tests.ops.cuda.test_compiler import check_static_claims, needs_nvrtc
from tests.ops.problems import assert_as_exact_as_reference, assert_chunks_equal_one_piece, draw, solve

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


@pytest.fixture(params=list(DESIGNS))
def design(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The persistent backend takes this design, whatever its model of time says."""

    def make_plan(chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1, rank: int = 0) -> WidePlan:
        found = plans_of(request.param, batch, hidden, task, heads) or list(
            wide.plans(chip, batch, hidden, task, heads)
        )
        return min(found, key=lambda plan: (plan.slots >= plan.register_chunks + plan.shared_chunks, plan.blocks))

    monkeypatch.setattr(persistent, "make_plan", make_plan)
    name: str = request.param
    return name


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper"
)
gpu: Callable[..., object] = lambda test: pytest.mark.gpu(on_hopper(test))  # noqa: E731


@gpu
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seq_len=st.integers(1, 20),
    batch=st.integers(1, 70),
    hidden=st.sampled_from([72, 128, 200, 256, 640, 704, 1024]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    cell=st.sampled_from(["tanh", "softsign"]),
    with_h0=st.booleans(),
    reset_rate=st.sampled_from([None, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_errs_no_more_than_the_reference(
    design: str,
    seq_len: int,
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    cell: str,
    with_h0: bool,
    reset_rate: float | None,
    seed: int,
) -> None:
    options = {"with_h0": with_h0, "reset_rate": reset_rate, "cell": cell, "seed": seed}
    assert_as_exact_as_reference(draw(seq_len, batch, hidden, dtype=dtype, device="cuda", **options), "persistent")


@gpu
def test_heads(design: str) -> None:
    p = draw(5, 9, 512, dtype=torch.bfloat16, device="cuda", operator="block_diagonal", heads=4)
    assert_as_exact_as_reference(p, "persistent")


@gpu
def test_every_run_gives_the_same_bits(design: str) -> None:
    p = draw(200, 60, DESIGNS[design][-1], dtype=torch.bfloat16, device="cuda")
    first, *others = (solve(p, "persistent") for _ in range(4))
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


@gpu
def test_chunks_with_carried_state_equal_one_piece(design: str) -> None:
    assert_chunks_equal_one_piece(
        draw(30, 33, DESIGNS[design][-1], dtype=torch.bfloat16, device="cuda"), "persistent", 11
    )


@gpu
def test_a_nan_stays_in_its_row_until_a_reset(design: str) -> None:
    p = draw(12, 20, 256, dtype=torch.bfloat16, device="cuda", reset_rate=0.0)
    assert p.reset is not None
    p.pre[2, 1, 3] = torch.nan
    p.reset[9, 1] = True
    result = solve(p, "persistent")
    bad = torch.zeros(12, 20, dtype=torch.bool, device="cuda")
    bad[3:9, 1] = True
    assert torch.equal(result["h"].isnan().all(-1), bad)
    bad[2, 1] = True
    assert torch.equal(result["h"].isnan().any(-1), bad)
    assert torch.equal(result["dpre"].isnan().any(-1).any(0), bad.any(0))


@gpu
def test_a_nan_in_the_weights_ends(design: str) -> None:
    p = draw(6, 20, 256, dtype=torch.bfloat16, device="cuda")
    assert isinstance(p.weight, torch.Tensor)
    p.weight[3, 5] = torch.nan
    assert solve(p, "persistent")["h"][-1].isnan().any()

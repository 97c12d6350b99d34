"""The kernels of low rank: their plans, what they are handed, and on a GPU each design, asked for by name."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from elman.ops import backends, loop, low_rank, operators, persistent
from elman.ops.cells import CELLS, FUSED_CELLS
from elman.ops.cuda.compiler import flatten
from elman.ops.low_rank import LowRankPlan
from elman.ops.operators import Dense, LowRank
from elman.ops.planning import BLOCK_ROWS, TYPICAL_CHIPS, Chip, Task
from elman.ops.wide import WidePlan
from tests.ops.cuda.test_compiler import check_static_claims, needs_nvrtc
from tests.ops.problems import (
    assert_a_nan_stays_in_its_row,
    assert_as_exact_as_reference,
    assert_chunks_equal_one_piece,
    draw,
    parts,
    solve,
)

H200 = TYPICAL_CHIPS["sm_90a"]
CELLS_OF_ONE_PRODUCT = [cell for cell in FUSED_CELLS.values() if cell.products == 1]
TASKS = [Task(direction, cell) for cell in CELLS_OF_ONE_PRODUCT for direction in ("forward", "backward")]
TANH = Task("forward", CELLS["tanh"])
#: By name: blocks a tile, whether states are asked for ahead where tiles allow it, and the multiprocessors that the GPU
#: is made out to have, so that groups have several tiles.
DESIGNS = {
    "one tile": (1, False, 132),
    "several tiles": (1, False, 8),
    "several tiles, ahead": (1, True, 8),
    "two blocks": (2, False, 132),
    "two blocks, several tiles, ahead": (2, True, 8),
}


@settings(deadline=None, derandomize=True)
@given(
    chip=st.sampled_from(sorted(TYPICAL_CHIPS)),
    task=st.sampled_from(TASKS),
    batch=st.integers(1, 1000),
    hidden=st.integers(1, 500).map(lambda n: 8 * n),
    rank=st.integers(1, 120).map(lambda n: 8 * n),
)
def test_a_plan_covers_the_problem(chip: str, task: Task, batch: int, hidden: int, rank: int) -> None:
    for plan in low_rank.plans(TYPICAL_CHIPS[chip], batch, hidden, rank, task):
        # Every CTA has units or ranks: one that had neither would not tell the others that it is done.
        assert 16 * plan.row_tiles * plan.columns >= hidden
        assert 16 * plan.rank_tiles * plan.columns >= rank
        before = plan.columns - 1
        assert 16 * plan.row_tiles * before < hidden or 16 * plan.rank_tiles * before < rank
        rows = 8 * plan.blocks * plan.tiles
        assert rows * plan.groups >= batch > rows * (plan.groups - 1)
        assert plan.groups * plan.columns <= TYPICAL_CHIPS[chip].multiprocessors
        assert plan.register_units + plan.shared_units == -(-rank // 256)
        assert plan.rank_register_units + plan.rank_shared_units == -(-hidden // 256)
        assert min(plan.register_units, plan.rank_register_units) >= 1
        assert plan.tiles >= 3 or not plan.ahead
        warps_of_cells = plan.row_tiles * (plan.blocks if task.cell.reads_memory else 1)
        assert warps_of_cells + plan.rank_tiles + 1 <= 8
        assert plan.shared_bytes <= TYPICAL_CHIPS[chip].shared_bytes


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.cell.name} {task.direction}")
@pytest.mark.parametrize("batch", [64, 256])
def test_e5_of_50m_parameters_is_factored(batch: int, task: Task) -> None:
    plan = persistent.make_plan(H200, batch, 2816, task, rank=496)
    assert isinstance(plan, LowRankPlan)


@pytest.mark.parametrize(("batch", "hidden", "rank"), [(64, 64, 16), (64, 1280, 320), (64, 1280, 1280)])
def test_what_is_faster_composed_is_composed(batch: int, hidden: int, rank: int) -> None:
    assert not isinstance(persistent.make_plan(H200, batch, hidden, TANH, rank=rank), LowRankPlan)
    assert not any(low_rank.plans(H200, batch, hidden, rank, Task("forward", CELLS["lstm"])))


def test_a_wide_state_of_low_rank_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its factors it fits where a dense weight does not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(persistent, "chip_of", lambda index: H200)
    monkeypatch.setattr(persistent, "compiler_version", lambda: "13.0.88")
    monkeypatch.setattr(persistent, "_is_captured", lambda: False)
    device = torch.device("cuda:0")
    e5 = backends.Problem(512, 256, 2816, torch.bfloat16, device, LowRank, CELLS["tanh"], rank=495)
    assert backends.choose("auto", e5) == "persistent"
    wide = replace(e5, batch_size=8, hidden_size=5120, rank=128)
    assert persistent.why_not(wide) is None
    assert "H = 5120 is over" in str(persistent.why_not(replace(wide, operator=Dense, rank=0)))
    assert "H = 8192 of rank 4096 is over its limit" in str(
        persistent.why_not(replace(wide, hidden_size=8192, rank=4091))
    )


@needs_nvrtc
def test_the_shared_memory_is_what_the_kernels_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's sum against the sources' own, for every cell, by the compiler."""
    claims = []
    for task in TASKS:
        for batch, hidden, rank in ((64, 512, 128), (250, 1280, 320), (64, 2816, 496)):
            for plan in low_rank.plans(H200, batch, hidden, rank, task):
                backward = str(task.direction == "backward").lower()
                sizes = re.search(r", (\d.*)>", plan.kernel(task, "bf16"))
                assert sizes is not None
                shape = f"low_rank::Shape<{task.cell.functor}, {backward}, {sizes[1]}>"
                used = f"{shape}::kCarriedOffset + {plan.tiles} * {shape}::kCarriedBytes + {shape}::kRankBytes"
                claims.append(f'static_assert({used} == {plan.shared_bytes}, "{plan}");')
    assert any("::kCarriedBytes" in claim and ", 2, true>::kRankBytes" in claim for claim in claims)
    check_static_claims(monkeypatch, "low_rank.cuh", claims, "kCarriedBytes +")


def parameters(source: str, kernel: str) -> list[str]:
    found = re.search(rf"{kernel}\(([^)]*)\)", flatten(source))
    assert found is not None
    return [part.split()[-1].lstrip("*") for part in found[1].split(",")]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_arguments_are_those_of_the_other_kernels_but_for_the_weights(direction: str) -> None:
    others = parameters("persistent.cuh", f"persistent_{direction}")
    assert others[1] == "weight"
    expected = [others[0], "first", "second", *others[2:], "ranks"]
    assert parameters("low_rank.cuh", f"low_rank_{direction}") == expected


def run_like_the_kernels(
    module: object,
    name: str,
    blocks: int,
    threads: int,
    arguments: Sequence[Tensor | int | None],
    device: torch.device,
    *,
    shared_bytes: int,
    cluster: None,
    cooperative: bool,
) -> None:
    """``launch`` by the loop, with the weight that the kernels' two matrices make."""
    first, second, ranks = arguments[1], arguments[2], arguments[-1]
    _, batch, hidden, pitch = arguments[-6:-2]
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert isinstance(hidden, int)
    assert cooperative
    assert cluster is None
    assert pitch == hidden
    assert first.shape == second.T.shape == (ranks, hidden)
    assert hidden % 8 == first.shape[0] % 8 == 0
    assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor))
    product = second @ first
    ring = arguments[-7]
    assert isinstance(ring, Tensor)
    assert ring.unique().tolist() == [0xFF]
    assert len(ring) >= 8 * 2 * batch * (hidden + first.shape[0])  # type: ignore[operator]
    if name == "forward":
        pre, _, _, _, h0, _, reset, h, saved, *_ = arguments
        states = [] if h0 is None else [h0]
        made, _, (kept,) = loop.forward(pre, Dense(product), None, states, reset, CELLS["tanh"], True)  # type: ignore[arg-type]
        h.copy_(made)  # type: ignore[union-attr]
        saved.copy_(kept)  # type: ignore[union-attr]
    else:
        dh, _, _, dh_last, _, reset, saved, _, _, dpre, _, dh0, *_ = arguments
        given = (dh, [] if dh_last is None else [dh_last], dh, [saved], Dense(product.T), [], reset)
        made, _, _, dstates = loop.backward(*given, CELLS["tanh"], dh0 is not None)  # type: ignore[arg-type]
        dpre.copy_(made)  # type: ignore[union-attr]
        if dh0 is not None:
            dh0.copy_(dstates[0])  # type: ignore[union-attr]


@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize(("hidden", "rank"), [(13, 3), (24, 8), (16, 20)])
def test_factors_reach_the_kernels(monkeypatch: pytest.MonkeyPatch, hidden: int, rank: int, with_h0: bool) -> None:
    """Filled up to what the kernels take, in the order and the direction in which a step multiplies by them."""

    def make_plan(chip: Chip, batch: int, hidden: int, task: Task, heads: int, rank: int) -> LowRankPlan:
        return next(low_rank.plans(chip, batch, hidden, rank, task))

    monkeypatch.setattr(persistent, "make_plan", make_plan)
    monkeypatch.setattr(persistent, "chip_of", lambda index: H200)
    monkeypatch.setattr(persistent, "_module", lambda task, dtype, plan: SimpleNamespace(kernels=(task.direction,)))
    monkeypatch.setattr(persistent, "launch", run_like_the_kernels)
    p = draw(5, 3, hidden, operator="low_rank", rank=rank, with_h0=with_h0)
    made, tanh = LowRank(*parts(p.weight)), CELLS["tanh"]
    results = []
    for walk in (persistent, loop):
        h, _, saved = walk.forward(p.pre.unsqueeze(2), made, None, parts(p.h0), p.reset, tanh, True)
        dpre, _, _, dstates = walk.backward(p.dh, parts(p.dh_last), h, saved, made, parts(p.h0), p.reset, tanh, with_h0)
        results.append([h, *saved, dpre, *dstates])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cell", ["tanh", "triple_r", "gru"])
@pytest.mark.parametrize("rank", [3, 8, 20, 32, 40])
def test_every_rank_is_as_exact_as_the_reference_in_the_loop(rank: int, cell: str, dtype: torch.dtype) -> None:
    """By thin products where they are fewer, by the composed matrix elsewhere; gradients value by value."""
    p = draw(7, 6, 32, operator="low_rank", rank=rank, dtype=dtype, cell=cell)
    assert_as_exact_as_reference(p, "loop")


def test_the_gradients_of_thin_factors_never_make_a_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = operators.sum_of_outer_products

    def note(a: Tensor, b: Tensor) -> Tensor:
        found = original(a, b)
        sizes.append(found.shape)
        return found

    monkeypatch.setattr(operators, "sum_of_outer_products", note)
    u, v, rows = torch.randn(32, 4), torch.randn(4, 32), torch.randn(50, 32)
    du, dv = LowRank(u, v).weight_gradients(rows, rows.tanh())
    assert du.shape == u.shape
    assert dv.shape == v.shape
    assert sizes == [(32, 4), (4, 32)]


@pytest.fixture(params=list(DESIGNS))
def design(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The persistent backend takes this design, whatever its model of time says."""
    blocks, ahead, multiprocessors = DESIGNS[request.param]

    def make_plan(
        chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1, rank: int = 0
    ) -> LowRankPlan | WidePlan | persistent.Plan:
        of_blocks = 1 if batch <= BLOCK_ROWS else blocks  # plans have no more blocks than there are rows
        # As small a GPU as asked for, or the smallest that the weights fit.
        for number in range(min(multiprocessors, chip.multiprocessors), chip.multiprocessors + 1):
            smaller = replace(chip, multiprocessors=number)
            found = [p for p in low_rank.plans(smaller, batch, hidden, rank, task) if p.blocks == of_blocks]
            if found:
                return min(found, key=lambda plan: (plan.ahead != ahead, plan.microseconds(task)))
        raise AssertionError(f"no plan of {blocks} blocks for {batch} × {hidden}, rank {rank}")

    monkeypatch.setattr(persistent, "make_plan", make_plan)
    name: str = request.param
    return name


gpu: Callable[..., object] = pytest.mark.gpu


@gpu
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seq_len=st.integers(1, 20),
    batch=st.integers(1, 70),
    hidden=st.sampled_from([8, 101, 640]),
    rank=st.sampled_from([1, 19, 300]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    cell=st.sampled_from(["tanh", "softsign", "delta"]),
    with_h0=st.booleans(),
    reset_rate=st.sampled_from([None, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_errs_no_more_than_the_reference(
    design: str,
    seq_len: int,
    batch: int,
    hidden: int,
    rank: int,
    dtype: torch.dtype,
    cell: str,
    with_h0: bool,
    reset_rate: float | None,
    seed: int,
) -> None:
    """Every output and every gradient, those of both factors value by value."""
    options = {"with_h0": with_h0, "reset_rate": reset_rate, "cell": cell, "seed": seed, "rank": rank}
    p = draw(seq_len, batch, hidden, dtype=dtype, device="cuda", operator="low_rank", **options)
    assert_as_exact_as_reference(p, "persistent")


@gpu
@pytest.mark.parametrize("design", ["several tiles"], indirect=True)
@pytest.mark.parametrize("cell", [cell.name for cell in CELLS_OF_ONE_PRODUCT])
def test_every_cell(design: str, cell: str) -> None:
    for with_h0 in (False, True):
        p = draw(6, 20, 104, dtype=torch.bfloat16, device="cuda", cell=cell, operator="low_rank", with_h0=with_h0)
        assert_as_exact_as_reference(p, "persistent")


@gpu
@pytest.mark.parametrize(("seq_len", "batch"), [(1, 64), (9, 64), (5, 253)])
def test_e5_of_50m_parameters(seq_len: int, batch: int) -> None:
    """What the backend takes for it; one tile of the last has five rows, and every other CTA has no ranks left."""
    p = draw(seq_len, batch, 2816, dtype=torch.bfloat16, device="cuda", operator="low_rank", rank=495)
    assert_as_exact_as_reference(p, "persistent")


@gpu
def test_every_run_gives_the_same_bits(design: str) -> None:
    p = draw(300, 60, 640, dtype=torch.bfloat16, device="cuda", operator="low_rank")
    first, *others = (solve(p, "persistent") for _ in range(4))
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


@gpu
def test_chunks_with_carried_state_equal_one_piece(design: str) -> None:
    p = draw(30, 33, 640, dtype=torch.bfloat16, device="cuda", operator="low_rank")
    assert_chunks_equal_one_piece(p, "persistent", 11)


@gpu
def test_a_nan_stays_in_its_row_until_a_reset(design: str) -> None:
    p = draw(12, 20, 256, dtype=torch.bfloat16, device="cuda", operator="low_rank", reset_rate=0.0)
    assert_a_nan_stays_in_its_row(p, "persistent")

"""On a GPU: the kernels by wgmma, each of their designs by name."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.split import SHAPES, best_plans, using
from elman.ops import persistent, split, wide
from elman.ops.persistent import AnyPlan
from elman.ops.planning import Chip, Task
from tests.ops import test_split, test_wide
from tests.ops.problems import (
    assert_a_nan_stays_in_its_row,
    assert_as_exact_as_reference,
    assert_chunks_equal_one_piece,
    draw,
    solve,
)


@dataclass(frozen=True)
class Design:
    """A width that it is what its name says at, and the least that its kernels take."""

    hidden: int
    least: int


DESIGNS = {
    **{("wide", name): Design(sizes[-1], 8) for name, sizes in test_wide.DESIGNS.items()},
    **{("split", name): Design(sizes[1], 200) for name, sizes in test_split.DESIGNS.items()},
}


@pytest.fixture(params=list(DESIGNS), ids=" ".join)
def design(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Design:
    """The persistent backend takes this design where it fits, and else another of these kernels."""
    kernels, name = request.param
    plans_of, plans = {
        "wide": (test_wide.plans_of, wide.plans),
        "split": (test_split.plans_of, split.plans),
    }[kernels]

    def make_plan(chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1, rank: int = 0) -> AnyPlan:
        found = plans_of(name, batch, hidden, task, heads) or list(plans(chip, batch, hidden, task, heads))
        return min(found, key=lambda plan: (plan.slots >= plan.register_chunks + plan.shared_chunks, plan.blocks))

    monkeypatch.setattr(persistent, "make_plan", make_plan)
    return DESIGNS[kernels, name]


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper"
)
gpu: Callable[..., object] = lambda test: pytest.mark.gpu(on_hopper(test))  # noqa: E731


@gpu
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seq_len=st.integers(1, 20),
    batch=st.integers(1, 70),
    hidden=st.sampled_from([72, 128, 200, 256, 392, 640, 704, 1024, 1280]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    cell=st.sampled_from(["tanh", "softsign"]),
    with_h0=st.booleans(),
    reset_rate=st.sampled_from([None, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_errs_no_more_than_the_reference(
    design: Design,
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
    hidden = max(hidden, design.least)
    assert_as_exact_as_reference(draw(seq_len, batch, hidden, dtype=dtype, device="cuda", **options), "persistent")


@gpu
def test_heads(design: Design) -> None:
    p = draw(5, 9, 512, dtype=torch.bfloat16, device="cuda", operator="block_diagonal", heads=2)
    assert_as_exact_as_reference(p, "persistent")


@gpu
def test_every_run_gives_the_same_bits(design: Design) -> None:
    p = draw(200, 60, design.hidden, dtype=torch.bfloat16, device="cuda")
    first, *others = (solve(p, "persistent") for _ in range(4))
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


@gpu
@pytest.mark.parametrize(("batch", "hidden"), SHAPES)
def test_every_run_of_full_size_gives_the_same_bits(batch: int, hidden: int) -> None:
    """Of the plans that are to be timed: what is written over before it is read may be so once in millions of times."""
    p = draw(100, batch, hidden, dtype=torch.bfloat16, device="cuda")
    for plans in best_plans(persistent.chip_of(0), batch, hidden, 4):
        with using(plans):
            first, *others = (solve(p, "persistent") for _ in range(12))
        assert all(torch.equal(value, other[name]) for other in others for name, value in first.items()), plans


@gpu
def test_a_cuda_graph_gives_the_same_bits(design: Design) -> None:
    """All CTAs run at a time, and where the depth is split in clusters: what a graph holds must keep both."""
    p = draw(20, 60, design.hidden, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = solve(p, "persistent")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve(p, "persistent")
    for _ in range(3):
        for value in captured.values():
            value.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(value, expected[name]) for name, value in captured.items())


@gpu
def test_chunks_with_carried_state_equal_one_piece(design: Design) -> None:
    assert_chunks_equal_one_piece(draw(30, 33, design.hidden, dtype=torch.bfloat16, device="cuda"), "persistent", 11)


@gpu
def test_a_nan_stays_in_its_row_until_a_reset(design: Design) -> None:
    p = draw(12, 20, 256, dtype=torch.bfloat16, device="cuda", reset_rate=0.0)
    assert_a_nan_stays_in_its_row(p, "persistent")


@gpu
def test_a_nan_in_the_weights_ends(design: Design) -> None:
    p = draw(6, 20, 256, dtype=torch.bfloat16, device="cuda")
    assert isinstance(p.weight, torch.Tensor)
    p.weight[3, 5] = torch.nan
    assert solve(p, "persistent")["h"][-1].isnan().any()

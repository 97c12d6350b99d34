"""What the table of errors runs, and that it tells right from wrong; on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import correctness
from benchmarks.correctness import Case, cases, designs, rows
from benchmarks.designs import LOW_RANK, SPLIT, WIDE
from elman.ops.cells import FUSED_CELLS
from elman.ops.low_rank import LowRankPlan
from elman.ops.split import SplitPlan
from elman.ops.wide import WidePlan
from tests.ops.problems import Problem, draw, solve
from tests.ops.test_persistent import CHIPS, H200


def test_every_design_is_there_with_several_tiles() -> None:
    found = designs(H200)
    assert len(found) == len(set(map(str, found))) == 27
    for case in found:
        plans = case.plans(H200)
        assert {task.direction for task in plans} == {"forward", "backward"}
        for plan in plans.values():
            assert case.design is not None
            design, blocks = case.design
            if isinstance(plan, WidePlan):
                assert plan.split == WIDE[design]
                few = blocks == 8 and plan.split == 1
                assert few == (plan.slots < plan.register_chunks + plan.shared_chunks) == (plan.shared_chunks > 0)
            elif isinstance(plan, SplitPlan):
                assert plan.cluster == SPLIT[design]
            elif isinstance(plan, LowRankPlan):
                assert design == LOW_RANK
            else:
                assert plan.exchange == design
            assert plan.blocks == blocks
            assert plan.tiles >= 2
            assert plan.columns >= 2
    assert not any(case.design and case.design[0] in {**WIDE, **SPLIT} for case in designs(CHIPS["A100"]))


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_what_is_compiled_ahead_is_what_runs(chip: str) -> None:
    every = cases(CHIPS[chip], small=False)
    assert {str(case.design) for case in every} > {"None", "('StagedRing3', 1)"}
    names = " ".join(
        name for case in every for module in case.modules(torch.float16, CHIPS[chip]) for name in module.kernels
    )
    for cell in FUSED_CELLS.values():
        assert f"persistent_backward<fp16, {cell.functor}," in names
        assert f"step_forward<{cell.functor}, fp16" in names
    assert "diagonal_forward<Tanh, fp16" in names
    assert ("wide_backward<fp16, Tanh" in names) == (chip == "H200")


def test_right_and_wrong_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_cpu(*shape: int, **options: Any) -> Problem:
        return draw(*shape, **{**options, "device": "cpu"})

    wanted = [Case(5, 3, 8), Case(4, 5, 16, "lstm", {"cell": "lstm"}), Case(3, 2, 8, "saturated", saturated=True)]
    monkeypatch.setattr(correctness, "draw", on_cpu)
    found = list(rows(wanted, torch.bfloat16, ["loop", "persistent"]))
    assert [right for _, right in found] == [True] * 6
    assert found[0][0].startswith("| 5 × 3 × 8 | loop | ")
    assert found[0][0].endswith("| same |")
    assert "lstm | persistent | – |" in found[3][0]

    def off(problem: Problem, backend: str) -> dict[str, Tensor]:
        found = solve(problem, backend)
        return found if backend == "reference" else {**found, "dh0": found["dh0"] * 1.1}

    monkeypatch.setattr(correctness, "solve", off)
    assert [right for _, right in rows(wanted[:1], torch.bfloat16, ["loop"])] == [False]
    numbers = iter(range(10))
    monkeypatch.setattr(
        correctness, "solve", lambda *given: {**solve(*given), "h": solve(*given)["h"] + next(numbers) * 1e-9}
    )
    ((line, right),) = rows(wanted[:1], torch.float32, ["loop"])
    assert ("DIFFER" in line, right) == (True, False)

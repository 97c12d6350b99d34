"""Which plans the persistent backend makes, and why it refuses, for GPUs that need not be there."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.recurrence import SHAPES
from elman.errors import UsageError
from elman.ops import backends, loop, persistent, split, wide
from elman.ops.cells import CELLS, FUSED_CELLS, Cell
from elman.ops.cuda import launch
from elman.ops.cuda.compiler import CompilerUnavailableError, Module, flatten
from elman.ops.operators import OPERATORS, BlockDiagonal, Dense, Diagonal, Operator
from elman.ops.persistent import AnyPlan, Chip, Plan, Task
from elman.ops.split import SplitPlan
from elman.ops.wide import WidePlan
from tests.ops.cuda.test_compiler import check_static_claims, needs_nvrtc
from tests.ops.problems import draw, parts, solve

H200 = Chip((9, 0), 132, 227 * 1024)
A100 = Chip((8, 0), 108, 163 * 1024)
RTX_4090 = Chip((8, 9), 128, 99 * 1024)
CHIPS = {"H200": H200, "A100": A100, "RTX 4090": RTX_4090}
ODD = Cell("odd", "h = pre", None, lambda pre, rec, memory: ((pre[0],), ()), lambda *args: ((), (), args[-1]))
MEASURED = SHAPES["tanh"]


TASKS = [Task(direction, cell) for cell in FUSED_CELLS.values() for direction in ("forward", "backward")]
TANH = Task("forward", CELLS["tanh"])


def assert_covers(plan: AnyPlan, chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1) -> None:
    """Every batch row and every unit has its CTA, all of the weight has its place, and all CTAs that wait are there."""
    for kernels, kind in ((wide, WidePlan), (split, SplitPlan)):  # at which test_wide.py and test_split.py look
        if isinstance(plan, kind):
            assert plan in kernels.plans(chip, batch, hidden, task, heads)
            return
    assert isinstance(plan, Plan)
    products = task.cell.products
    rows_of_unit, depth = (products, hidden) if task.direction == "forward" else (1, products * hidden)
    units_of_cta = 16 * plan.row_tiles // rows_of_unit // 8 * 8
    assert units_of_cta * plan.columns >= hidden > units_of_cta * (plan.columns - 1)
    rows = 8 * plan.blocks * plan.tiles
    assert rows * plan.groups >= batch > rows * (plan.groups - 1)
    assert plan.register_units >= 1
    assert plan.register_units + plan.shared_units == -(-depth // 256)
    assert plan.shared_bytes <= chip.shared_bytes
    if plan.exchange == "ClusterPush":
        assert plan.columns <= 16
        assert chip.capability >= (9, 0)
    else:
        assert heads * plan.groups * plan.columns <= chip.multiprocessors


@settings(deadline=None, derandomize=True)
@given(
    chip=st.sampled_from(sorted(CHIPS)),
    task=st.sampled_from(TASKS),
    batch=st.integers(1, 1000),
    hidden=st.integers(1, 150).map(lambda n: 8 * n),
    heads=st.sampled_from([1, 1, 2, 8, 200]),
)
def test_a_plan_covers_the_problem(chip: str, task: Task, batch: int, hidden: int, heads: int) -> None:
    if persistent._has_plans(CHIPS[chip], batch, hidden, task.cell.name, heads):
        plan = persistent.make_plan(CHIPS[chip], batch, hidden, task, heads)
        assert_covers(plan, CHIPS[chip], batch, hidden, task, heads)
    else:
        assert task.cell.products * heads > 1


@pytest.mark.parametrize(("batch", "hidden"), MEASURED)
def test_every_measured_shape_fits_an_h200(batch: int, hidden: int) -> None:
    assert_covers(persistent.make_plan(H200, batch, hidden, TANH), H200, batch, hidden, TANH)
    assert persistent.largest_hidden(H200, "tanh") >= 3584


@pytest.mark.parametrize("cell", FUSED_CELLS)
@pytest.mark.parametrize(("batch", "hidden"), [(64, 512), (64, 1024), (256, 1024)])
def test_every_cell_fits_an_h200(cell: str, batch: int, hidden: int) -> None:
    assert persistent._has_plans(H200, batch, hidden, cell)


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_what_is_not_refused_has_a_plan(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide state may fit with a small batch and not with a large one."""
    monkeypatch.setattr(persistent, "chip_of", lambda index: CHIPS[chip])
    monkeypatch.setattr(persistent, "compiler_version", lambda: "13")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused = set()
    for hidden in range(8, 4400, 136):
        for batch in (1, 9, 64, 1000):
            task = TASKS[(hidden + batch) // 8 % len(TASKS)]
            reason = persistent._why_not_on_device(0, batch, hidden, task.cell.name)
            if reason is None:
                assert_covers(persistent.make_plan(CHIPS[chip], batch, hidden, task), CHIPS[chip], batch, hidden, task)
            else:
                refused.add(reason.split(" = ")[0])
    assert "H" in refused


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("batch", "hidden"), MEASURED)
def test_it_pays_where_it_was_measured_to(
    batch: int, hidden: int, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At all of them: at 128 × 3584 by 6.9 µs a step to 11.2 of the loop in a CUDA graph on an H200."""
    monkeypatch.setattr(persistent, "chip_of", lambda index: H200)
    monkeypatch.setattr(persistent, "_is_captured", lambda: captured)
    assert persistent.pays(
        backends.Problem(512, batch, hidden, torch.bfloat16, torch.device("cuda", 0), Dense, CELLS["tanh"])
    )


def test_the_loop_has_what_would_take_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the models alone."""
    monkeypatch.setattr(persistent, "chip_of", lambda index: H200)
    monkeypatch.setattr(persistent, "_is_captured", lambda: True)
    for batch, pays in ((128, True), (1024, False)):
        problem = backends.Problem(512, batch, 3584, torch.bfloat16, torch.device("cuda", 0), Dense, CELLS["tanh"])
        assert persistent.pays(problem) == pays


@pytest.mark.parametrize("captured", [False, True])
def test_a_cuda_graph_spares_the_loop_its_launches(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LSTM of 256 × 1024 took 9.8 µs a step forward and 20 backward on an H100, the loop 9.2 and 16 in a graph."""
    monkeypatch.setattr(persistent, "chip_of", lambda index: H200)
    monkeypatch.setattr(persistent, "_is_captured", lambda: captured)
    lstm = backends.Problem(512, 256, 1024, torch.bfloat16, torch.device("cuda", 0), Dense, CELLS["lstm"])
    assert persistent.pays(lstm) == (not captured)


@pytest.fixture
def on_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(persistent, "chip_of", lambda index: H200)
    monkeypatch.setattr(persistent, "compiler_version", lambda: "13.0.88")
    monkeypatch.setattr(persistent, "_is_captured", lambda: False)


def problem(**changes: object) -> backends.Problem:
    given = {
        "seq_len": 8,
        "batch_size": 4,
        "hidden_size": 64,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:0"),
        "operator": Dense,
        "cell": CELLS["tanh"],
    }
    return backends.Problem(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, r"bf16 or fp16, not torch\.float32: cast the inputs, or use backend='loop'"),
        ({"device": torch.device("cpu")}, "needs an NVIDIA GPU, not device cpu"),
        ({"hidden_size": 8192}, r"H = 8192 is over its limit \d+ for cell='tanh' on this GPU: use backend='loop'"),
        ({"hidden_size": 9600, "heads": 4}, r"N = 4 heads of 2400 units is over its limit \d+ .*backend='loop'"),
        ({"operator": Diagonal, "dtype": torch.int8}, "int8: cast to one of"),
        ({"operator": Diagonal, "batch_size": 2**24, "hidden_size": 512}, "4 GB or more: split the batch"),
        ({"operator": Diagonal, "cell": ODD}, "cell='odd'"),
        ({"seq_len": 2**20, "batch_size": 2**11}, r"T × B = .* split the batch"),
        ({"seq_len": 1, "batch_size": 2**20, "hidden_size": 512}, r"B × H = .* split the batch"),
        (
            {"seq_len": 1, "batch_size": 2**16, "hidden_size": 512, "cell": CELLS["lstm"]},
            r"B × H × products = 65536 × 512 × 4 is not below",
        ),
        ({"cell": ODD}, "cell='odd'"),
    ],
)
def test_why_not_names_the_limit_and_the_cure(on_an_h200: None, changes: dict[str, object], words: str) -> None:
    reason = persistent.why_not(problem(**changes))
    assert reason is not None
    assert re.search(words, reason), reason


def test_auto_takes_it_where_it_can(on_an_h200: None) -> None:
    assert persistent.why_not(problem()) is None
    assert backends.choose("auto", problem()) == "persistent"
    assert backends.choose("auto", problem(dtype=torch.float32)) == "loop"
    assert backends.choose("auto", problem(hidden_size=8192)) == "loop"
    assert backends.choose("auto", problem(hidden_size=60)) == "persistent"
    assert backends.choose("auto", problem(hidden_size=24, heads=8, operator=BlockDiagonal)) == "persistent"
    assert (
        backends.choose("auto", problem(hidden_size=8191, heads=8191, operator=Diagonal, dtype=torch.float32))
        == "persistent"
    )
    with pytest.raises(UsageError, match="backend='persistent' cannot run this problem: H = 8192"):
        backends.choose("persistent", problem(hidden_size=8192))


def test_an_old_gpu_and_a_missing_compiler_are_reasons(on_an_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent, "chip_of", lambda index: Chip((7, 5), 40, 64 * 1024))
    assert "compute capability 8.0 or newer, not 7.5" in str(persistent.why_not(problem()))

    def missing() -> str:
        raise CompilerUnavailableError("no NVRTC: pip install nvidia-cuda-nvrtc")

    monkeypatch.setattr(persistent, "compiler_version", missing)
    assert "pip install nvidia-cuda-nvrtc" in str(persistent.why_not(problem()))


@needs_nvrtc
def test_the_shared_memory_is_what_the_kernels_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's sum against the sources' own, for every cell, by the compiler."""
    claims = []
    for task in TASKS:
        for batch, hidden in ((5, 64), (64, 512), (250, 1024)):
            found = (p for p in persistent._plans(H200, batch, hidden, task, 1) if isinstance(p, Plan))
            plan = min(found, key=lambda plan: plan.microseconds(task))
            depth = hidden * (task.cell.products if task.direction == "backward" else 1)
            units, tile = plan.register_units + plan.shared_units, plan.blocks * 512
            exchange = {"StagedRing2": 2, "StagedRing3": 3}.get(plan.exchange, 0) * units * 8 * tile
            if plan.exchange == "ClusterPush":
                exchange = 128 * -(-16 * plan.tiles // 128) + 2 * plan.tiles * tile * -(-depth // 32)
            backward = str(task.direction == "backward").lower()
            sizes = f"{plan.row_tiles}, {plan.register_units}, {plan.shared_units}, {plan.blocks}"
            shape = f"persistent::Shape<{task.cell.functor}, {backward}, {sizes}>"
            used = f"{shape}::kCarriedOffset + {plan.tiles} * {shape}::kCarriedBytes + {exchange}"
            claims.append(f'static_assert({used} == {plan.shared_bytes}, "{plan}");')
    check_static_claims(monkeypatch, "persistent.cuh", claims, "kCarriedBytes +")


def batches_of_one_kernel(chip: Chip, hidden: int) -> tuple[int, int]:
    """A batch, and a smaller one whose plan has the same instantiation and asks for less shared memory."""
    found: dict[Module, tuple[int, Plan]] = {}
    for batch in range(1, 1000):
        plan = persistent.make_plan(chip, batch, hidden, TANH)
        small, of_small = found.setdefault(persistent._module(TANH, torch.bfloat16, plan), (batch, plan))
        if plan.shared_bytes > max(of_small.shared_bytes, 48 * 1024):
            return batch, small
    pytest.skip("no two plans on this GPU share a kernel")


@pytest.mark.gpu
def test_a_kernel_runs_with_less_shared_memory_and_then_with_more() -> None:
    launch._kernel.cache_clear()  # it may have met these plans before
    large, small = batches_of_one_kernel(persistent.chip_of(0), 512)
    problems = [draw(2, batch, 512, dtype=torch.bfloat16, device="cuda") for batch in (large, small, large)]
    first, _, again = (solve(p, "persistent") for p in problems)
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.gpu
def test_narrow_heads_leave_wide_ones_their_shared_memory() -> None:
    """Backwards, an LSTM's heads of 8 and of 16 units have one kernel and differ in shared memory."""
    wide = draw(2, 4, 16, dtype=torch.bfloat16, device="cuda", cell="lstm")
    narrow = draw(2, 4, 16, dtype=torch.bfloat16, device="cuda", cell="lstm", operator="block_diagonal", heads=2)
    first, _, again = (solve(p, "persistent") for p in (wide, narrow, wide))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_arguments_are_in_the_kernels_order() -> None:
    """What ``_launch`` hands over by position is what the sources name at those positions."""
    text = flatten("persistent.cuh")
    for name, expected in (
        (
            "persistent_forward",
            "pre weight bias h0 c0 reset h saved c c_last ring steps batch hidden pitch tiles",
        ),
        (
            "persistent_backward",
            "dh weight dh_last dc_last reset saved memory0 memory dpre drec dh0 dc0 ring "
            "steps batch hidden pitch tiles",
        ),
    ):
        parameters = re.search(rf"{name}\(([^)]*)\)", text)
        assert parameters is not None
        assert [part.split()[-1].lstrip("*") for part in parameters[1].split(",")] == expected.split()


@pytest.mark.parametrize("hidden", [8, 64, 512])
def test_what_pushes_to_a_cluster_is_launched_as_one(monkeypatch: pytest.MonkeyPatch, hidden: int) -> None:
    """Of one CTA too: outside a cluster the instruction is illegal."""
    launches: list[dict[str, object]] = []
    monkeypatch.setattr(persistent, "chip_of", lambda index: H200)
    monkeypatch.setattr(persistent, "launch", lambda *args, **options: launches.append(options))
    p = draw(2, 3, hidden, dtype=torch.bfloat16)
    given = (p.pre.unsqueeze(2), Dense(parts(p.weight)[0]), None, [], None, CELLS["tanh"], True)
    persistent.forward(*given)
    plan = persistent.make_plan(H200, 3, hidden, TANH)
    assert isinstance(plan, Plan)
    assert plan.exchange == "ClusterPush"
    assert [options["cluster"] for options in launches] == [plan.columns]


def run_like_the_kernels(
    task: Task,
    operator: Operator,
    tensors: tuple[Tensor | None, ...],
    like: Tensor,
    layout: persistent._Layout,
) -> None:
    """The launch of a kernel by the loop on the same tensors: what the kernels take, every width a multiple of 8."""
    cell, weight = task.cell, layout.matrices(operator)
    assert weight is not None
    assert layout.width % 8 == 0
    assert all(x is None or x.is_contiguous() for x in tensors)
    operator = Dense(weight) if layout.heads == 1 else BlockDiagonal(weight)
    if task.direction == "forward":
        pre, bias, h0, c0, reset, *outputs = tensors
        states = [x for x in (h0, c0) if x is not None]
        h, last, kept = loop.forward(pre, operator, bias, states, reset, cell, outputs[1] is not None)
        saved, c = (*kept, None, None)[:2]
        made = [h, saved, c, *last]
    else:
        dh, dh_last, dc_last, reset, saved, memory0, memory, *outputs = tensors
        states = [] if memory0 is None else [memory0] * cell.states
        dlast = [x for x in (dh_last, dc_last) if x is not None]
        h = dh if memory is None else memory
        kept = [saved, memory] if cell.states == 2 else [saved]
        need = outputs[2] is not None
        dpre, drec, _, dstates = loop.backward(dh, dlast, h, kept, operator, states, reset, cell, need)
        made = [dpre, None if cell.additive else drec, *dstates]
    for output, value in zip(outputs, made, strict=False):
        assert (output is None) == (value is None)
        if output is not None:
            output.copy_(value)


@pytest.mark.parametrize("cell", FUSED_CELLS)
@pytest.mark.parametrize(
    ("operator", "hidden", "heads"), [("dense", 13, 1), ("block_diagonal", 12, 4), ("low_rank", 16, 1)]
)
@pytest.mark.parametrize("with_h0", [False, True])
def test_odd_widths_and_heads_reach_the_kernels(
    monkeypatch: pytest.MonkeyPatch, cell: str, operator: str, hidden: int, heads: int, with_h0: bool
) -> None:
    monkeypatch.setattr(persistent, "_launch", run_like_the_kernels)
    p = draw(5, 3, hidden, cell=cell, operator=operator, heads=heads, with_h0=with_h0, with_bias=True)
    pre = p.pre.unsqueeze(2) if p.pre.ndim == 3 else p.pre
    made = OPERATORS[operator](*parts(p.weight))
    results = []
    for walk in (persistent, loop):
        h, last, saved = walk.forward(pre, made, p.bias, parts(p.h0), p.reset, CELLS[cell], True)
        given = (p.dh, parts(p.dh_last), h, saved, made, parts(p.h0), p.reset, CELLS[cell], with_h0)
        dpre, drec, _, dstates = walk.backward(*given)
        results.append([h, *last, *saved, dpre, drec, *dstates])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)

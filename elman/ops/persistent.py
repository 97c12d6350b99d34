"""The ``persistent`` backend: all steps in one launch, the recurrent weights on chip for the whole of it.

The kernels are in ``cuda/persistent.cuh``; here is how they are given work: which instantiation and which grid suit a
problem, and why there may be none.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index as as_int  # unlike int, it makes a constant of a symbolic size under torch.compile
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from elman.ops import diagonal, low_rank, narrow, split, wide
from elman.ops.cells import CELLS, FUSED_CELLS, Cell
from elman.ops.cuda.compiler import CompilerUnavailableError, Module, compiler_version
from elman.ops.cuda.launch import NoRoomError, launch
from elman.ops.low_rank import LowRankPlan
from elman.ops.narrow import Plan
from elman.ops.operators import Diagonal, LowRank, Operator
from elman.ops.planning import DIRECTIONS, TYPICAL_CHIPS, Chip, Task
from elman.ops.registration import constant_when_traced
from elman.ops.split import SplitPlan
from elman.ops.wide import WidePlan

if TYPE_CHECKING:
    from elman.ops.backends import Problem

_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16"}

#: Bytes a thread. Weights take all registers that are left, and ptxas does not place the last few of them perfectly.
_SPILL_LIMIT = 64
#: Of a cell with memory, whose own warps are the slower ones: what registers they have saves more than the spills cost.
_SPILL_LIMIT_WITH_MEMORY = 144


def _tasks(cell: Cell) -> list[Task]:
    return [Task(direction, cell) for direction in DIRECTIONS]


AnyPlan = Plan | WidePlan | SplitPlan | LowRankPlan


def why_not(problem: Problem) -> str | None:
    """In words, why this backend cannot run the problem; None if it can."""
    if problem.device.type != "cuda":
        return f"it needs an NVIDIA GPU, not device {problem.device}: use backend='auto'"
    if problem.operator is Diagonal:
        return diagonal.why_not(problem) or _why_no_kernels()
    if problem.cell.functor is None:
        return f"it does not run cell={problem.cell.name!r}: use backend='auto'"
    if problem.dtype not in _NUMBERS:
        return f"it computes in bf16 or fp16, not {problem.dtype}: cast the inputs, or use backend='loop'"
    if problem.seq_len * problem.batch_size >= 2**31:
        return f"T × B = {problem.seq_len} × {problem.batch_size} is not below 2^31: split the batch"
    if problem.batch_size * problem.heads * _width(problem) * problem.cell.products >= 2**27:
        factors = [problem.batch_size, problem.hidden_size, *([problem.cell.products] * (problem.cell.products > 1))]
        words = "B × H × products" if len(factors) == 3 else "B × H"
        return f"{words} = {' × '.join(map(str, factors))} is not below 2^27: split the batch"
    return _why_not_on_device(problem.device.index, *_shape(problem))


def _width(problem: Problem) -> int:
    """The units of a head with those that fill it up to what the kernels take, see ``_Layout``."""
    units = problem.hidden_size // problem.heads
    return units + -units % 8


def _shape(problem: Problem) -> tuple[int, int, str, int, int]:
    sizes = as_int(problem.heads), as_int(low_rank.filled(problem.rank))
    return as_int(problem.batch_size), as_int(_width(problem)), problem.cell.name, *sizes


@constant_when_traced
def _why_no_kernels() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device: use backend='auto'"
    try:
        compiler_version()
    except CompilerUnavailableError as error:
        return f"{error}, or use backend='loop'"
    return None


@constant_when_traced
def _why_not_on_device(
    index: int | None, batch: int, hidden: int, cell: str, heads: int = 1, rank: int = 0
) -> str | None:
    reason = _why_no_kernels()
    if reason is not None:
        return reason
    chip = chip_of(torch.cuda.current_device() if index is None else index)
    if chip.capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or newer, not {'.'.join(map(str, chip.capability))}"
    what = f"H = {hidden}" if heads == 1 else f"N = {heads} heads of {hidden} units"
    what += f" of rank {rank}" if rank else ""
    if not _has_plans(chip, 1, hidden, cell, heads, rank):
        limit = largest_hidden(chip, cell, heads, rank)
        return f"{what} is over its limit {limit} for cell={cell!r} on this GPU: use backend='loop'"
    if not _has_plans(chip, batch, hidden, cell, heads, rank):
        return f"B = {batch} is too large beside {what} on this GPU: split the batch, or use backend='loop'"
    return None


def pays(problem: Problem) -> bool:
    """Whether it is likely to be faster than the ``loop`` backend."""
    if problem.operator is Diagonal:
        return True
    return _pays_on_device(problem.device.index, *_shape(problem), _is_captured())


_will_be_captured = False


@contextlib.contextmanager
def choosing_for_graphs() -> Iterator[None]:
    """Inside the ``with`` block ``auto`` chooses as for work in a CUDA graph: of what will be captured later.

    So what is captured has run before, as it must, and what is traced for the compiler knows where it will run.
    """
    global _will_be_captured
    before, _will_be_captured = _will_be_captured, True
    try:
        yield
    finally:
        _will_be_captured = before


@constant_when_traced
def _is_captured() -> bool:
    """Whether what runs now goes into a CUDA graph, or is to be chosen as if it did."""
    return _will_be_captured or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


@constant_when_traced
def _pays_on_device(
    index: int | None, batch: int, hidden: int, cell: str, heads: int, rank: int, captured: bool
) -> bool:
    chip = chip_of(torch.cuda.current_device() if index is None else index)
    both = [make_plan(chip, batch, hidden, task, heads, rank).microseconds(task) for task in _tasks(CELLS[cell])]
    return sum(both) / len(both) < _loop_microseconds(batch, heads * hidden, CELLS[cell].products, captured)


def _loop_microseconds(batch: int, hidden: int, products: int, captured: bool) -> float:
    """A step of the loop backend, the mean of both directions: outside a CUDA graph the host sets the pace (18 to 20).

    Inside one within 10% of what tanh, LSTM and GRU took at the shapes of benchmarks.recurrence.
    """
    forward = 4.12 + products**0.5 * (1.43e-3 * hidden + 3.5e-6 * batch * hidden)
    return forward * (1 + 0.1 * products) if captured else 18


def status() -> tuple[bool, str]:
    """Whether ``auto`` would use it on this machine, and how or why not."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    index = torch.cuda.current_device()
    reason = _why_not_on_device(index, 1, 8, "tanh")
    if reason is not None:
        return False, reason
    limit = largest_hidden(chip_of(index), "tanh")
    return True, f"bf16 and fp16, H up to {limit} (tanh), diagonal weights of any; NVRTC {compiler_version()}"


@functools.cache
def chip_of(index: int) -> Chip:
    """The GPU of this index."""
    properties = torch.cuda.get_device_properties(index)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Chip((properties.major, properties.minor), properties.multi_processor_count, shared)


@functools.cache
def largest_hidden(chip: Chip, cell: str, heads: int = 1, rank: int = 0) -> int:
    """The widest state, or the widest heads, whose weights the GPU holds."""
    return max((hidden for hidden in range(8, 8192, 8) if _has_plans(chip, 1, hidden, cell, heads, rank)), default=0)


@functools.cache
def _has_plans(chip: Chip, batch: int, hidden: int, cell: str, heads: int = 1, rank: int = 0) -> bool:
    return all(any(_plans(chip, batch, hidden, task, heads, rank)) for task in _tasks(CELLS[cell]))


@functools.cache
def make_plan(chip: Chip, batch: int, hidden: int, task: Task, heads: int = 1, rank: int = 0) -> AnyPlan:
    """The plan for ``heads`` times ``hidden`` units that the model of a step's time likes best.

    Of a weight of low rank ``rank`` is r, and both plans for its factors and for their product are there.
    """
    return _fastest(_plans(chip, batch, hidden, task, heads, rank), task)


def _fastest(plans: Iterable[AnyPlan], task: Task) -> AnyPlan:
    """By the models of a step's time; the split kernels must be ahead by as much as theirs errs where it was timed."""
    return min(plans, key=lambda plan: plan.microseconds(task) * (1.1 if isinstance(plan, SplitPlan) else 1))


def _plans(chip: Chip, batch: int, hidden: int, task: Task, heads: int, rank: int = 0) -> Iterator[AnyPlan]:
    """Every plan that fits, but for those that are known to be slow."""
    if rank:
        yield from low_rank.plans(chip, batch, hidden, rank, task)
    else:  # beside the factors they have not been timed
        yield from split.plans(chip, batch, hidden, task, heads)
    yield from wide.plans(chip, batch, hidden, task, heads)
    yield from narrow.plans(chip, batch, hidden, task, heads)


def saves_pre(operator: str, cell: Cell) -> bool:
    """See ``fused.Walk``."""
    return operator == Diagonal.name and diagonal.saves_pre(cell)


def forward(
    pre: Tensor,
    operator: Operator,
    bias: Tensor | None,
    states: Sequence[Tensor],
    reset: Tensor | None,
    cell: Cell,
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """All steps; see ``fused.Walk``."""
    if isinstance(operator, Diagonal):
        return diagonal.forward(pre, operator, bias, states, reset, cell, save)
    layout = _Layout(operator.heads, pre.shape[-1] // operator.heads)
    given = [layout.widen(x) for x in (bias, *(*states, None, None)[:2])]
    seq_len, batch, hidden = *pre.shape[:2], layout.heads * layout.width
    h = pre.new_empty(seq_len, batch, hidden)
    saved = pre.new_empty(seq_len, batch, cell.saved, hidden) if save else None
    memory_dtype = cell.dtypes(h.dtype)[-1]
    c = torch.empty_like(h, dtype=memory_dtype) if save and cell.states == 2 else None
    c_last = torch.empty_like(h[0], dtype=memory_dtype) if cell.states == 2 else None
    tensors = (layout.widen(pre), *given, _dense(reset), h, saved, c, c_last)
    _launch(Task("forward", cell), operator, tensors, h, layout)
    return layout.crop(h), layout.crop_all(c_last), layout.crop_all(saved, c)


def backward(
    dh: Tensor | None,
    dlast: Sequence[Tensor],
    h: Tensor,
    saved: Sequence[Tensor],
    operator: Operator,
    states: Sequence[Tensor],
    reset: Tensor | None,
    cell: Cell,
    need_states: bool,
) -> tuple[Tensor, Tensor, list[Tensor] | None, list[Tensor]]:
    """All steps, the last one first; see ``fused.Walk``."""
    if isinstance(operator, Diagonal):
        return diagonal.backward(dh, dlast, h, saved, operator, states, reset, cell, need_states)
    layout = _Layout(operator.heads, h.shape[-1] // operator.heads)
    memory0 = states[-1] if states else None
    memory = (h, *saved[1:])[-1] if cell.reads_memory else None
    given = [layout.widen(x) for x in (torch.zeros_like(h) if dh is None else dh, *(*dlast, None, None)[:2])]
    kept = [layout.widen(x) for x in (saved[0], memory0, memory)]
    seq_len, batch, _ = h.shape
    hidden = layout.heads * layout.width
    dpre = h.new_empty(seq_len, batch, cell.gates, hidden)
    drec = None if cell.additive else h.new_empty(seq_len, batch, cell.products, hidden)
    dstates = [h.new_empty(batch, hidden, dtype=dtype) for dtype in cell.dtypes(h.dtype)] if need_states else []
    made = (dpre, drec, *(*dstates, None, None)[:2])
    _launch(Task("backward", cell), operator, (*given, _dense(reset), *kept, *made), dpre, layout)
    dpre = layout.crop(dpre)
    drec = dpre[:, :, : cell.products] if drec is None else layout.crop(drec)
    return dpre, drec, None, layout.crop_all(*dstates)


@dataclass(frozen=True)
class _Layout:
    """How units lie: ``heads`` runs of ``units``, each of which the kernels take in a multiple of 8.

    Units that are added to fill one up have inputs of zero, and nothing comes out of them: their columns of the weights
    are zero, and what a cell makes of zeros is finite.
    """

    heads: int
    units: int

    @property
    def width(self) -> int:
        return self.units + self._excess

    @property
    def _excess(self) -> int:
        return -self.units % 8

    def widen(self, x: Tensor | None) -> Tensor | None:
        """With every head (the last dimension holds them) filled up."""
        if x is None or not self._excess:
            return _dense(x)
        return F.pad(x.reshape(*x.shape[:-1], self.heads, self.units), (0, self._excess)).flatten(-2)

    def crop(self, x: Tensor) -> Tensor:
        """Without what ``widen`` has added."""
        if not self._excess:
            return x
        return x.view(*x.shape[:-1], self.heads, self.width)[..., : self.units].flatten(-2)

    def crop_all(self, *tensors: Tensor | None) -> list[Tensor]:
        """Those that are there."""
        return [self.crop(x) for x in tensors if x is not None]

    def matrices(self, operator: Operator) -> Tensor | None:
        """One matrix a product and head, of low rank too."""
        (weight,) = (operator.dense() if isinstance(operator, LowRank) else operator).weights
        return _dense(F.pad(weight, (0, self._excess) * 2) if self._excess else weight)


def _dense(x: Tensor | None) -> Tensor | None:
    """A tensor that the kernels' wide loads can read: contiguous and aligned."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _launch(task: Task, operator: Operator, tensors: tuple[Tensor | None, ...], like: Tensor, layout: _Layout) -> None:
    """Runs a kernel on tensors in its order, but for the weights, which come second and depend on the plan.

    Raises:
        NoRoomError: by no plan do all blocks run at a time on this GPU.
    """
    problem = like.shape[1], layout.width, task, layout.heads, low_rank.filled(operator.rank)
    chip = chip_of(like.device.index)
    plan = make_plan(chip, *problem)
    while True:
        if (chip, plan) in _without_room:
            others = [other for other in _plans(chip, *problem) if (chip, other) not in _without_room]
            if not others:
                raise NoRoomError("this GPU runs the blocks of none of the plans at a time: use backend='loop'")
            plan = _fastest(others, task)
        try:
            return _launch_by(plan, task, operator, tensors, like, layout)
        except NoRoomError as error:
            if not _without_room:
                warnings.warn(f"{error}: other plans are taken, as a rule slower ones", RuntimeWarning, stacklevel=2)
            _without_room.add((chip, plan))


#: Plans whose blocks a GPU did not run at a time: how many clusters it has room for is a guess but for an H200.
_without_room: set[tuple[Chip, AnyPlan]] = set()


def _launch_by(
    plan: AnyPlan,
    task: Task,
    operator: Operator,
    tensors: tuple[Tensor | None, ...],
    like: Tensor,
    layout: _Layout,
) -> None:
    seq_len, batch, heads, hidden = *like.shape[:2], layout.heads, layout.width
    sizes = [seq_len, batch, hidden, heads * hidden, plan.tiles]
    if isinstance(plan, LowRankPlan):
        assert isinstance(operator, LowRank)
        weights = [_dense(x) for x in low_rank.factors(operator, task, hidden)]
        sizes.append(plan.rank)
    else:
        weights = [layout.matrices(operator)]
    # No published value has all bits set, so this marks every slot as empty.
    room = plan.ring_bytes(task, hidden, heads)
    ring = torch.full((room,), 0xFF, dtype=torch.uint8, device=like.device) if room else None
    module = _module(task, like.dtype, plan)
    launch(
        module,
        module.kernels[0],
        heads * plan.groups * plan.columns,
        plan.threads,
        (tensors[0], *weights, *tensors[1:], ring, *sizes),
        like.device,
        shared_bytes=plan.shared_bytes,
        cluster=plan.cluster,
        cooperative=plan.cooperative,
    )


@functools.cache
def _module(task: Task, dtype: torch.dtype, plan: AnyPlan, architectures: tuple[str, ...] = ()) -> Module:
    spill_limit = _SPILL_LIMIT_WITH_MEMORY if task.cell.reads_memory else _SPILL_LIMIT
    return Module(
        plan.source, (plan.kernel(task, _NUMBERS[dtype]),), architectures=architectures, spill_limit=spill_limit
    )


def shipped_modules() -> list[Module]:
    """Instantiations that stand for all: every cell each way on a GPU of each generation, on the newest plans of small,
    middling and wide problems and both types.
    """
    newest = "sm_90a"
    return [
        _module(task, dtype, make_plan(chip, batch, hidden, task), (arch,))
        for arch, chip in TYPICAL_CHIPS.items()
        for cell in FUSED_CELLS.values()
        for task in _tasks(cell)
        for (batch, hidden), dtype in (
            ((256, 1280), torch.bfloat16),
            *((((64, 512), torch.float16), ((128, 3584), torch.bfloat16)) if arch == newest else ()),
        )
        if _has_plans(chip, batch, hidden, cell.name)
    ] + [
        *diagonal.shipped_modules(),
        *(
            _module(task, torch.bfloat16, plan, (arch,))
            for arch, chip in TYPICAL_CHIPS.items()
            for cell in (FUSED_CELLS.values() if arch == newest else [CELLS["tanh"]])
            for task in _tasks(cell)
            for plan in low_rank.typical_plans(chip, task)
        ),
        # The designs of wide.cuh and split.cuh that no cell of these shapes takes.
        *(
            _module(
                task, torch.bfloat16, _fastest(plans(TYPICAL_CHIPS[newest], batch, hidden, task, 1), task), (newest,)
            )
            for task in _tasks(CELLS["tanh"])
            for plans in (wide.plans, split.plans)
            for batch, hidden in ((512, 1280), (256, 2048))
        ),
    ]

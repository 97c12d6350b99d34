"""The ``persistent`` backend: all steps in one launch, the recurrent weights on chip for the whole of it.

The kernels are in ``cuda/persistent.cuh``; here is how they are given work: which instantiation and which grid suit a
problem, and why there may be none.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from elman.ops.cells import CELLS, Cell
from elman.ops.cuda.compiler import CompilerUnavailableError, Module, compiler_version, kernels
from elman.ops.operators import Dense, Operator

if TYPE_CHECKING:
    from elman.ops.backends import Problem

_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_RUNS = ("tanh", "softsign")
_DIRECTIONS = ("forward", "backward")

# What persistent.cuh and exchange.cuh fix.
_THREADS = 512
_PRODUCT_WARPS = 8
_BLOCK_ROWS = 8
_UNIT_DEPTH = 32
_UNIT_BYTES = _BLOCK_ROWS * _UNIT_DEPTH * 2
_RING_SLOTS = 8

#: Bytes a thread. Weights take all registers that are left, and ptxas does not place the last few of them perfectly.
_SPILL_LIMIT = 64
_CLOCKS_PER_MICROSECOND = 1900
#: A step of the loop backend outside a CUDA graph, where the host sets the pace (18 to 20 measured; NOTES.md).
_LOOP_MICROSECONDS = 18
_MAX_ROW_TILES = 7
_MAX_CLUSTER = 16
#: How CTAs hand each other the state, by the name in exchange.cuh, and the copies of a tile that each stages.
_EXCHANGES = {"PolledRing": 0, "StagedRing2": 2, "StagedRing3": 3, "ClusterPush": 0}
#: Clusters of 1, 2, … CTAs that an H200 runs at a time, measured; other chips are taken to be alike in proportion.
_CLUSTERS = (132, 66, 40, 30, 22, 18, 16, 15, 11, 11, 8, 8, 8, 7, 7, 7)


@dataclass(frozen=True)
class Chip:
    """What a plan depends on: the GPU's generation, its multiprocessors, and the shared memory that a block may use."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Plan:
    """One instantiation of the kernels and its grid; cuda/README.md has the meaning of the numbers.

    Attributes:
        row_tiles: tiles of 16 rows of the weight that a CTA keeps.
        register_units, shared_units: how many 256 columns of it lie in registers and in shared memory.
        blocks: blocks of 8 batch rows a tile.
        exchange: how CTAs hand each other the state, one of ``_EXCHANGES``.
        columns: CTAs of a group, which share its batch rows and split the hidden units.
        groups: of batch rows, independent of each other.
        tiles: of a group, one after another in every step.
        shared_bytes: dynamic shared memory a CTA.
    """

    row_tiles: int
    register_units: int
    shared_units: int
    blocks: int
    exchange: str
    columns: int
    groups: int
    tiles: int
    shared_bytes: int

    @property
    def clustered(self) -> bool:
        return self.exchange == "ClusterPush"


def why_not(problem: Problem) -> str | None:
    """In words, why this backend cannot run the problem; None if it can."""
    if problem.operator is not Dense:
        return "it runs dense weights (H, H) only: use backend='auto'"
    if problem.cell.name not in _RUNS:
        return f"it does not run cell={problem.cell.name!r}: use backend='auto'"
    if problem.dtype not in _NUMBERS:
        return f"it computes in bf16 or fp16, not {problem.dtype}: cast the inputs, or use backend='loop'"
    if problem.device.type != "cuda":
        return f"it needs an NVIDIA GPU, not device {problem.device}: use backend='auto'"
    if problem.hidden_size % 8:
        return f"H = {problem.hidden_size} is not a multiple of 8: use one that is, or backend='loop'"
    if problem.seq_len * problem.batch_size >= 2**31:
        return f"T × B = {problem.seq_len} × {problem.batch_size} is not below 2^31: split the batch"
    if problem.batch_size * problem.hidden_size >= 2**27:
        return f"B × H = {problem.batch_size} × {problem.hidden_size} is not below 2^27: split the batch"
    return _why_not_on_device(problem.device.index, int(problem.batch_size), int(problem.hidden_size))


def _why_not_on_device(index: int | None, batch: int, hidden: int) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device: use backend='auto'"
    try:
        compiler_version()
    except CompilerUnavailableError as error:
        return f"{error}, or use backend='loop'"
    chip = chip_of(torch.cuda.current_device() if index is None else index)
    if chip.capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or newer, not {'.'.join(map(str, chip.capability))}"
    if not _has_plan(chip, 1, hidden):
        return f"H = {hidden} is over its limit {largest_hidden(chip)} on this GPU: use backend='loop'"
    if not _has_plan(chip, batch, hidden):
        return f"B = {batch} is too large beside H = {hidden} on this GPU: split the batch, or use backend='loop'"
    return None


def pays(problem: Problem) -> bool:
    """Whether it is likely to be faster than the ``loop`` backend."""
    return _pays_on_device(problem.device.index, int(problem.batch_size), int(problem.hidden_size))


def _pays_on_device(index: int | None, batch: int, hidden: int) -> bool:
    chip = chip_of(torch.cuda.current_device() if index is None else index)
    # The model counts no stalls: on an H200 a step took 1.5 to 2.3 times its clocks (benchmarks/results).
    return 2 * _step_clocks(make_plan(chip, batch, hidden)) / _CLOCKS_PER_MICROSECOND < _LOOP_MICROSECONDS


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo, which takes seconds.
_why_not_on_device._dynamo_marked_constant = True  # type: ignore[attr-defined]
_pays_on_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def status() -> tuple[bool, str]:
    """Whether ``auto`` would use it on this machine, and how or why not."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    index = torch.cuda.current_device()
    reason = _why_not_on_device(index, 1, 8)
    if reason is not None:
        return False, reason
    return True, f"bf16 and fp16, H a multiple of 8 up to {largest_hidden(chip_of(index))}; NVRTC {compiler_version()}"


@functools.cache
def chip_of(index: int) -> Chip:
    """The GPU of this index."""
    properties = torch.cuda.get_device_properties(index)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Chip((properties.major, properties.minor), properties.multi_processor_count, shared)


@functools.cache
def largest_hidden(chip: Chip) -> int:
    """The widest state whose weights the GPU holds."""
    return max((hidden for hidden in range(8, 8192, 8) if any(_plans(chip, 1, hidden))), default=0)


@functools.cache
def _has_plan(chip: Chip, batch: int, hidden: int) -> bool:
    return any(_plans(chip, batch, hidden))


@functools.cache
def make_plan(chip: Chip, batch: int, hidden: int) -> Plan:
    """The plan that the model of a step's time likes best."""
    return min(_plans(chip, batch, hidden), key=lambda plan: _step_clocks(plan))


def _plans(chip: Chip, batch: int, hidden: int) -> Iterator[Plan]:
    """Every plan that fits, but for those that are known to be slow."""
    for exchange, row_tiles, blocks in itertools.product(_EXCHANGES, range(1, _MAX_ROW_TILES + 1), (1, 2)):
        plan = _fit(chip, batch, hidden, exchange, row_tiles, blocks)
        if plan is None or (blocks == 2 and batch <= _BLOCK_ROWS):
            continue
        # Polling pays while tiles are few, staging while there is another tile to work on; its third copy later still.
        fewest, most = {"PolledRing": (1, 3), "StagedRing2": (2, math.inf), "StagedRing3": (4, math.inf)}.get(
            exchange, (1, math.inf)
        )
        if fewest <= plan.tiles <= most:
            yield plan


def _fit(chip: Chip, batch: int, hidden: int, exchange: str, row_tiles: int, blocks: int) -> Plan | None:
    """CTAs of 16 × row_tiles hidden units on this problem; None where they do not fit."""
    clustered = exchange == "ClusterPush"
    if clustered and chip.capability < (9, 0):
        return None
    columns = math.ceil(hidden / (16 * row_tiles))
    if columns > (_MAX_CLUSTER if clustered else chip.multiprocessors):
        return None
    units = math.ceil(hidden / (_UNIT_DEPTH * _PRODUCT_WARPS))
    received = units if exchange == "PolledRing" else math.ceil(units / math.ceil(units / (5 if blocks == 1 else 3)))
    # setmaxnreg gives Hopper's product warps 200 registers and more; elsewhere all warps have 128.
    budget = (196 if blocks == 1 else 184) - (0 if chip.capability == (9, 0) else 96)
    budget -= 4 * blocks * (received + row_tiles)
    register_units = max(1, min(units, budget // (8 * row_tiles)))

    rows = _BLOCK_ROWS * blocks
    room = chip.multiprocessors // columns
    if clustered:
        room = max(1, _CLUSTERS[columns - 1] * chip.multiprocessors // _CLUSTERS[0])
    batch_tiles = math.ceil(batch / rows)
    tiles = math.ceil(batch_tiles / min(room, batch_tiles))

    shared = 2 * _PRODUCT_WARPS * rows * (16 * row_tiles + 4) * 4  # sums
    shared += _PRODUCT_WARPS * (units - register_units) * row_tiles * 1024  # weights
    shared += 2 * 2048 * row_tiles  # inputs, of which the backward pass has two
    shared += _EXCHANGES[exchange] * units * blocks * _PRODUCT_WARPS * _UNIT_BYTES
    if clustered:
        shared += 128 * math.ceil(16 * tiles / 128) + 2 * tiles * blocks * math.ceil(hidden / _UNIT_DEPTH) * _UNIT_BYTES
    if shared > chip.shared_bytes:
        return None
    groups = math.ceil(batch_tiles / tiles)
    return Plan(row_tiles, register_units, units - register_units, blocks, exchange, columns, groups, tiles, shared)


def _step_clocks(plan: Plan) -> float:
    """A rough count of clocks a step: its tiles one after another, or the exchange's latency if that is longer."""
    units = plan.register_units + plan.shared_units
    product = units * plan.row_tiles * plan.blocks * 26
    shared = 64 * (plan.shared_units * plan.row_tiles + plan.blocks * (plan.row_tiles + units))
    tile = max(product + 60, shared, 500 + 150 * plan.blocks)
    latency = (1000 if plan.clustered else 1500) + 350 + product
    if plan.exchange == "PolledRing":
        return latency + (plan.tiles - 1) * (tile + 400)
    return max(plan.tiles * tile, latency + (0 if plan.clustered else 100))


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
    h = pre.new_empty(pre[:, :, 0].shape)
    v = pre.new_empty(pre.shape) if save else None
    h0 = states[0] if states else None
    tensors = (_dense(pre), *map(_dense, operator.weights), _dense(h0), _dense(reset), h, v)
    _launch("forward", cell, tensors, h)
    return h, [], [] if v is None else [v]


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
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All steps, the last one first; see ``fused.Walk``."""
    dh = torch.zeros_like(h) if dh is None else dh
    dpre = torch.empty_like(saved[0])
    dh0 = h.new_empty(h.shape[1:]) if need_states else None
    dh_last = dlast[0] if dlast else None
    tensors = (_dense(dh), *map(_dense, operator.weights), _dense(dh_last), _dense(reset), saved[0], dpre, dh0)
    _launch("backward", cell, tensors, h)
    return dpre, dpre, [] if dh0 is None else [dh0]


def _dense(x: Tensor | None) -> Tensor | None:
    """A tensor that the kernels' wide loads can read: contiguous and aligned."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _launch(direction: str, cell: Cell, tensors: tuple[Tensor | None, ...], like: Tensor) -> None:
    from cuda.core import Device, LaunchConfig, Stream, launch

    index = like.device.index
    seq_len, batch, hidden = like.shape
    plan = make_plan(chip_of(index), batch, hidden)
    # A thread of autograd's that has not run a kernel yet has no CUDA context.
    Device(index).set_current()
    kernel = _kernel(direction, cell.name, like.dtype, plan, index)
    if plan.clustered:
        ring = None
        config = LaunchConfig(grid=plan.groups, cluster=plan.columns, block=_THREADS, shmem_size=plan.shared_bytes)
    else:
        units = plan.groups * plan.tiles * plan.blocks * math.ceil(hidden / _UNIT_DEPTH)
        # No published value has all bits set, so this marks every slot as empty.
        ring = torch.full((_RING_SLOTS * units * _UNIT_BYTES,), 0xFF, dtype=torch.uint8, device=like.device)
        config = LaunchConfig(
            grid=plan.groups * plan.columns, block=_THREADS, shmem_size=plan.shared_bytes, is_cooperative=True
        )
    pointers = [0 if x is None else x.data_ptr() for x in (*tensors, ring)]
    sizes = [np.int32(size) for size in (seq_len, batch, hidden, plan.tiles)]
    stream = Stream.from_handle(torch.cuda.current_stream(like.device).cuda_stream)
    launch(stream, config, kernel, *pointers, *sizes)


@functools.cache
def _kernel(direction: str, cell: str, dtype: torch.dtype, plan: Plan, index: int) -> object:
    """Compiled and loaded, with leave on this device to use the shared memory and the cluster size that it needs."""
    from cuda.bindings import driver

    kernel = kernels(_module(cell, dtype, plan), chip_of(index).capability)[_name(direction, cell, dtype, plan)]
    attributes = driver.CUfunction_attribute
    wanted = {attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: plan.shared_bytes}
    if plan.clustered:
        wanted[attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
    for attribute, value in wanted.items():
        (status,) = driver.cuKernelSetAttribute(attribute, value, kernel.handle, driver.CUdevice(index))
        if status:
            raise RuntimeError(f"cannot prepare the persistent kernel: {status.name} for {attribute.name} = {value}")
    return kernel


def _name(direction: str, cell: str, dtype: torch.dtype, plan: Plan) -> str:
    shape = f"{plan.row_tiles}, {plan.register_units}, {plan.shared_units}, {plan.blocks}, persistent::{plan.exchange}"
    return f"persistent_{direction}<{_NUMBERS[dtype]}, {CELLS[cell].functor}, {shape}>"


def _module(cell: str, dtype: torch.dtype, plan: Plan, architectures: tuple[str, ...] = ()) -> Module:
    names = tuple(_name(direction, cell, dtype, plan) for direction in _DIRECTIONS)
    return Module("persistent.cuh", names, architectures=architectures, spill_limit=_SPILL_LIMIT)


#: A GPU of each architecture: A100, RTX A6000, RTX 4090, H200.
_TYPICAL_CHIPS = {
    "sm_80": Chip((8, 0), 108, 163 * 1024),
    "sm_86": Chip((8, 6), 84, 99 * 1024),
    "sm_89": Chip((8, 9), 128, 99 * 1024),
    "sm_90a": Chip((9, 0), 132, 227 * 1024),
}


def shipped_modules() -> list[Module]:
    """Instantiations that stand for all: plans of small, middling and wide problems on a GPU of each generation."""
    modules = []
    for arch, chip in _TYPICAL_CHIPS.items():
        plans = dict.fromkeys(
            make_plan(chip, batch, hidden)
            for batch, hidden in ((64, 512), (256, 1280), (128, 3584))
            if hidden <= largest_hidden(chip)
        )
        modules += [_module(cell, dtype, plan, (arch,)) for plan in plans for dtype in _NUMBERS for cell in _RUNS]
    return modules

"""Plans for the kernels of low rank, ``cuda/low_rank.cuh``: which instantiation and grid suit a problem, and how fast.

A step is two thin products with an exchange after each, where a composed W = U V has one of either. That pays where W
is so wide that its product, or its place on the chip, costs more than an exchange.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from elman.ops.operators import LowRank
from elman.ops.planning import (
    BLOCK_ROWS,
    CLOCKS_PER_MICROSECOND,
    PRODUCT_WARPS,
    RING_SLOTS,
    THREADS,
    UNIT_BYTES,
    UNIT_DEPTH,
    Chip,
    Task,
)

#: A warp a row tile applies the cell, or sums up ranks, and one more fences.
_OTHER_WARPS = THREADS // 32 - PRODUCT_WARPS - 1
#: Of the registers of a product thread, beside weights, state and sums; for a second block of batch rows; and where
#: states are on their way during a product.
_OTHER_REGISTERS, _BLOCK_REGISTERS, _AHEAD_REGISTERS = 28, 8, 12
#: A group of fewer tiles would ask for states that are not there yet.
_TILES_AHEAD = 3


@dataclass(frozen=True)
class LowRankPlan:
    """One instantiation and its grid; cuda/README.md has the meaning of the numbers.

    Attributes:
        row_tiles, rank_tiles: tiles of 16 rows that a CTA keeps: of the matrix (H, r) and of the one (r, H).
        register_units, shared_units: how many 256 columns of the former lie in registers and in shared memory.
        rank_register_units, rank_shared_units: likewise of the latter.
        blocks: blocks of 8 batch rows a tile.
        ahead: whether the states of a tile are asked for before another's product, which takes registers.
        columns: CTAs of a group, which share its batch rows and split the hidden units and the ranks.
        groups: of batch rows, independent of each other.
        tiles: of a group, one after another in every step.
        shared_bytes: dynamic shared memory a CTA.
        rank: r, a multiple of 8.
    """

    row_tiles: int
    register_units: int
    shared_units: int
    rank_tiles: int
    rank_register_units: int
    rank_shared_units: int
    blocks: int
    ahead: bool
    columns: int
    groups: int
    tiles: int
    shared_bytes: int
    rank: int

    source = "low_rank.cuh"
    threads = THREADS
    cluster = None
    cooperative = True

    def kernel(self, task: Task, number: str) -> str:
        """Its C++ name, for the number type of this name."""
        shape = (
            self.row_tiles,
            self.register_units,
            self.shared_units,
            self.rank_tiles,
            self.rank_register_units,
            self.rank_shared_units,
            self.blocks,
            str(self.ahead).lower(),
        )
        return f"low_rank_{task.direction}<{number}, {task.cell.functor}, {', '.join(map(str, shape))}>"

    def ring_bytes(self, task: Task, hidden: int, heads: int) -> int:
        """The workspace in global memory: the exchanged states and ranks of some steps."""
        units = math.ceil(hidden / UNIT_DEPTH) + math.ceil(self.rank / UNIT_DEPTH)
        return RING_SLOTS * self.groups * self.tiles * self.blocks * units * UNIT_BYTES

    def microseconds(self, task: Task) -> float:
        """About how long a step takes on an H100: all tiles one after another, or the two products of one and what
        their results take to reach the group, if that is longer. A prediction, not yet measured.
        """
        down = _product(self.rank_register_units, self.rank_shared_units, self.rank_tiles, self.blocks)
        up = _product(self.register_units, self.shared_units, self.row_tiles, self.blocks)
        latency = down + up + 2 * (0.7 + 0.3 * self.blocks) + 0.1 * task.cell.gates
        # The product down waits for its state to come, 55 bytes a clock, behind a round trip to L2; or the product up
        # before it does.
        state = 0.35 + self._rank_units * self.blocks * PRODUCT_WARPS * UNIT_BYTES / 55 / (2 * CLOCKS_PER_MICROSECOND)
        tile = down + 0.35 + (max(up, state) if self.ahead else up + state)
        return max(latency + 0.2 * (self.tiles - 1), self.tiles * tile)

    @property
    def _rank_units(self) -> int:
        return self.rank_register_units + self.rank_shared_units


def _product(register_units: int, shared_units: int, row_tiles: int, blocks: int) -> float:
    """Microseconds of one product of a tile: its mma, or its reads of shared memory."""
    mma = (register_units + shared_units) * row_tiles * blocks * 26
    return max(mma, 64 * shared_units * row_tiles) / CLOCKS_PER_MICROSECOND


def factors(operator: LowRank, task: Task, hidden: int) -> list[Tensor]:
    """The matrices (r, H) and (H, r) that a step multiplies by in turn, filled up with zeros to multiples of 8."""
    u, v = (x.squeeze(0) if x.ndim == 3 else x for x in operator.weights)
    first, second = (v, u) if task.direction == "forward" else (u.mT, v.mT)
    rank = filled(operator.rank)
    sizes = ((first, rank, hidden), (second, hidden, rank))
    return [F.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0])).contiguous() for x, rows, columns in sizes]


def filled(rank: int) -> int:
    """The rank with those that fill it up to what the kernels take."""
    return rank + -rank % 8


def plans(chip: Chip, batch: int, hidden: int, rank: int, task: Task) -> Iterator[LowRankPlan]:
    """Every plan that fits, of the splits between registers and shared memory the fastest."""
    if task.cell.products != 1:
        return
    tiles = range(1, _OTHER_WARPS)
    for row_tiles, rank_tiles, blocks, ahead in itertools.product(tiles, tiles, (1, 2), (False, True)):
        if blocks == 1 or batch > BLOCK_ROWS:
            plan = _fit(chip, batch, hidden, rank, task, row_tiles, rank_tiles, blocks, ahead)
            if plan is not None:
                yield plan


def typical_plans(chip: Chip, task: Task) -> list[LowRankPlan]:
    """Plans that stand for all, each kernel once: of a wide state with few tiles and with many, and of a narrow one."""
    found = (
        min(plans(chip, *sizes, task), key=lambda plan: plan.microseconds(task), default=None)
        for sizes in ((64, 2816, 496), (256, 2816, 496), (64, 512, 128))
    )
    return list({plan.kernel(task, ""): plan for plan in found if plan is not None}.values())


def _fit(
    chip: Chip,
    batch: int,
    hidden: int,
    rank: int,
    task: Task,
    row_tiles: int,
    rank_tiles: int,
    blocks: int,
    ahead: bool,
) -> LowRankPlan | None:
    cell, rows = task.cell, BLOCK_ROWS * blocks
    # A thread a quad of units and a row, of which cells without memory take eight at a time.
    cell_warps = row_tiles * (blocks if cell.reads_memory else 1)
    columns = max(math.ceil(hidden / (16 * row_tiles)), math.ceil(rank / (16 * rank_tiles)))
    room = chip.multiprocessors // columns
    if cell_warps + rank_tiles > _OTHER_WARPS or room == 0:
        return None
    batch_tiles = math.ceil(batch / rows)
    tiles = math.ceil(batch_tiles / min(room, batch_tiles))
    if ahead and tiles < _TILES_AHEAD:
        return None
    units, rank_units = (math.ceil(depth / (UNIT_DEPTH * PRODUCT_WARPS)) for depth in (rank, hidden))

    # setmaxnreg gives Hopper's product warps more registers than the others; elsewhere all warps have 128.
    registers = 128
    if chip.capability == (9, 0):
        registers = {"forward": 160, "backward": 176}[task.direction] if cell.reads_memory else 216 - 8 * blocks
    chains = {1: 4, 2: 2, 3: 2}.get(rank_tiles * blocks, 1)
    down = 4 * blocks * (rank_units + chains * rank_tiles)
    up = 4 * blocks * (row_tiles + units + (rank_units if ahead else 0))
    registers -= _OTHER_REGISTERS + _BLOCK_REGISTERS * (blocks - 1) + _AHEAD_REGISTERS * ahead + max(down, up)
    splits = [
        (kept, units - kept, rank_kept, rank_units - rank_kept)
        for kept in range(1, units + 1)
        for rank_kept in [min(rank_units, (registers // 8 - row_tiles * kept) // rank_tiles)]
        if rank_kept >= 1
    ]
    if not splits:
        return None

    def time_of(split: tuple[int, int, int, int]) -> float:
        return _product(*split[:2], row_tiles, blocks) + _product(*split[2:], rank_tiles, blocks)

    register_units, shared_units, rank_register_units, rank_shared_units = min(splits, key=time_of)

    cell_threads = 32 * cell_warps
    cell_groups = 2 if 2 * cell_warps + rank_tiles + 1 <= _OTHER_WARPS + 1 else 1
    # Sums of both products, weights, inputs, and what is carried from step to step.
    shared = 2 * PRODUCT_WARPS * rows * (16 * (row_tiles + rank_tiles) + 8) * 4
    shared += PRODUCT_WARPS * (shared_units * row_tiles + rank_shared_units * rank_tiles) * 1024
    shared += (32 * cell_groups if cell.reads_memory else 64) * task.inputs * cell_threads
    shared += 16 * tiles * cell_threads * cell.reads_memory
    if shared > chip.shared_bytes:
        return None
    return LowRankPlan(
        row_tiles,
        register_units,
        shared_units,
        rank_tiles,
        rank_register_units,
        rank_shared_units,
        blocks,
        ahead,
        columns,
        math.ceil(batch_tiles / tiles),
        tiles,
        shared,
        rank,
    )

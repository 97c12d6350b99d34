"""Plans for the kernels of ``cuda/persistent.cuh``, whose tiles are of 8 or 16 batch rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

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

MAX_ROW_TILES = 12
#: Warps 8 to 14 apply the cell; the last one fences.
_MAX_CELL_THREADS = 7 * 32
_MAX_CLUSTER = 16
#: How CTAs hand each other the state, by the name in exchange.cuh, and the copies of a tile that each stages.
EXCHANGES = {"PolledRing": 0, "StagedRing2": 2, "StagedRing3": 3, "ClusterPush": 0}


@dataclass(frozen=True)
class Plan:
    """One instantiation of a kernel and its grid; cuda/README.md has the meaning of the numbers.

    Attributes:
        row_tiles: tiles of 16 rows of the weight that a CTA keeps.
        register_units, shared_units: how many 256 columns of it lie in registers and in shared memory.
        blocks: blocks of 8 batch rows a tile.
        exchange: how CTAs hand each other the state, one of ``EXCHANGES``.
        columns: CTAs of a group, which share its batch rows and split the hidden units of a head.
        groups: of batch rows of every head, independent of each other.
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

    source = "persistent.cuh"
    threads = THREADS

    @property
    def cluster(self) -> int | None:
        """CTAs of a cluster; one alone is launched as a cluster too, since it pushes to itself as to a peer."""
        return self.columns if self.exchange == "ClusterPush" else None

    @property
    def cooperative(self) -> bool:
        """Whether all CTAs wait for each other, and so must run at a time."""
        return self.exchange != "ClusterPush"

    def kernel(self, task: Task, number: str) -> str:
        """Its C++ name, for the number type of this name."""
        shape = (
            f"{self.row_tiles}, {self.register_units}, {self.shared_units}, {self.blocks}, persistent::{self.exchange}"
        )
        return f"persistent_{task.direction}<{number}, {task.cell.functor}, {shape}>"

    def ring_bytes(self, task: Task, hidden: int, heads: int) -> int:
        """The workspace in global memory: the exchanged state of some steps; none where a cluster exchanges it."""
        units = heads * self.groups * self.tiles * self.blocks * math.ceil(task.depth * hidden / UNIT_DEPTH)
        return RING_SLOTS * units * UNIT_BYTES if self.cooperative else 0

    def microseconds(self, task: Task) -> float:
        """About how long a step takes on an H200: all tiles, or one and the exchange's latency if that is longer.

        Three in four of the plans timed for benchmarks/NOTES.md took within a quarter of it.
        """
        units, rows = self.register_units + self.shared_units, BLOCK_ROWS * self.blocks
        product = units * self.row_tiles * self.blocks * 26 / CLOCKS_PER_MICROSECOND
        shared = (
            64 * (self.shared_units * self.row_tiles + self.blocks * (self.row_tiles + units)) / CLOCKS_PER_MICROSECOND
        )
        shared *= 1 if self.blocks == 1 else 0.93
        cell = (350 + 100 * self.blocks * task.cell.gates) / CLOCKS_PER_MICROSECOND
        tile = max(product + 0.06, shared, cell)
        latency = 0.7 + 0.3 * self.blocks + 0.1 * task.cell.gates + product
        if self.exchange == "PolledRing":
            return max(latency + 0.1 * (self.tiles - 1), 1.1 * self.tiles * tile)
        if not self.cooperative:
            pushed = rows * units * UNIT_DEPTH * PRODUCT_WARPS * 2 / 16 / (2 * CLOCKS_PER_MICROSECOND)
            return latency - 0.25 + max(0, pushed - 0.27) + (self.tiles - 1) * max(tile, pushed)
        return max(self.tiles * tile, latency + 0.2 * units + 0.5 * tile)


def plans(chip: Chip, batch: int, hidden: int, task: Task, heads: int) -> Iterator[Plan]:
    """Every plan that fits, but for those that are known to be slow."""
    for exchange, row_tiles, blocks in itertools.product(EXCHANGES, range(1, MAX_ROW_TILES + 1), (1, 2)):
        plan = fit(chip, batch, hidden, task, heads, exchange, row_tiles, blocks)
        if plan is None or (blocks == 2 and batch <= BLOCK_ROWS):
            continue
        # Polling pays while tiles are few, staging while there is another tile to work on; its third copy later still.
        fewest, most = {"PolledRing": (1, 2), "StagedRing2": (2, math.inf), "StagedRing3": (4, math.inf)}.get(
            exchange, (1, math.inf)
        )
        if fewest <= plan.tiles <= most:
            yield plan


def fit(
    chip: Chip, batch: int, hidden: int, task: Task, heads: int, exchange: str, row_tiles: int, blocks: int
) -> Plan | None:
    """CTAs of 16 × row_tiles rows of the weight on this problem; None where they do not fit."""
    clustered = exchange == "ClusterPush"
    if clustered and chip.capability < (9, 0):
        return None
    rows = BLOCK_ROWS * blocks
    owned = 16 * row_tiles // task.rows // 8 * 8  # hidden units
    cell_threads = 32 * math.ceil((rows if task.cell.reads_memory else BLOCK_ROWS) * owned / 128)
    if not 0 < cell_threads <= _MAX_CELL_THREADS:
        return None
    columns = math.ceil(hidden / owned)
    # All that wait for each other must run at a time: of clusters one, of rings every CTA.
    if columns > (_MAX_CLUSTER if clustered else chip.multiprocessors // heads):
        return None
    depth = task.depth * hidden
    units = math.ceil(depth / (UNIT_DEPTH * PRODUCT_WARPS))
    received = units if exchange == "PolledRing" else math.ceil(units / math.ceil(units / (5 if blocks == 1 else 3)))
    # setmaxnreg gives Hopper's product warps more registers than the cell's; elsewhere all warps have 128.
    budget = {"forward": 140, "backward": 156}[task.direction] if task.cell.reads_memory else 196
    budget = (budget if chip.capability == (9, 0) else 100) - 12 * (blocks - 1)
    budget -= 4 * blocks * (received + row_tiles)
    register_units = min(units, budget // (8 * row_tiles))
    if register_units < 1:
        return None

    room = chip.multiprocessors // (columns * heads)
    if clustered:
        room = max(1, chip.clusters(columns) // heads)
    batch_tiles = math.ceil(batch / rows)
    tiles = math.ceil(batch_tiles / min(room, batch_tiles))

    shared = 2 * PRODUCT_WARPS * rows * (16 * row_tiles + 4) * 4  # sums
    shared += PRODUCT_WARPS * (units - register_units) * row_tiles * 1024  # weights
    cell_groups = 2 if 2 * cell_threads <= THREADS - 32 * PRODUCT_WARPS else 1
    shared += (32 * cell_groups if task.cell.reads_memory else 64) * task.inputs * cell_threads
    shared += 16 * tiles * cell_threads * task.cell.reads_memory  # carried from step to step
    shared += EXCHANGES[exchange] * units * blocks * PRODUCT_WARPS * UNIT_BYTES
    if clustered:
        shared += 128 * math.ceil(16 * tiles / 128) + 2 * tiles * blocks * math.ceil(depth / UNIT_DEPTH) * UNIT_BYTES
    if shared > chip.shared_bytes:
        return None
    groups = math.ceil(batch_tiles / tiles)
    return Plan(row_tiles, register_units, units - register_units, blocks, exchange, columns, groups, tiles, shared)

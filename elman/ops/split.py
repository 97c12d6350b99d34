"""Plans for the kernels that split the depth over a cluster, ``cuda/split.cuh``: wide states, large batches, Hopper."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from elman.ops.planning import BLOCK_ROWS, Chip, Task
from elman.ops.wide import (
    CHUNK_DEPTH,
    CHUNK_STEPS,
    CLOCKS_PER_MICROSECOND,
    STEP_BYTES,
    chunk_bytes,
    clocks_per_wgmma,
    ring_bytes,
)

# What split.cuh fixes.
_CLUSTER_UNITS = 128
_PRODUCT_WARPS = 8
_GROUP_WARPS = 4
_WARP_UNITS = 16
_CELL_WARPS = 4
_PART_BYTES = 32 * 16  # the sums of a product warp, a block of batch rows

CLUSTERS = (2, 4)
_BLOCKS = range(2, 9)
#: A cell warp's: above, its registers spill.
_MAX_CELL_BLOCKS = 6
_MAX_REGISTER_CHUNKS = 4
_MAX_CHUNKS = 31
_MIN_SLOTS = 3
_LARGE = 8  # blocks


@dataclass(frozen=True)
class SplitPlan:
    """One instantiation and its grid; cuda/README.md has the meaning of the numbers.

    Attributes:
        register_chunks, shared_chunks: chunks of 128 columns of the weight that a CTA holds, by where they lie.
        blocks: of 8 batch rows a tile.
        slots: chunks of the state in the ring of a CTA; where there is room, those of two tiles. Never those of one:
            then the next tile could not come before this one is done with.
        cluster: CTAs that split the depth, and own 128 hidden units together.
        rooms: for the parts of sums, each of a tile.
        columns: CTAs of a group, which share its batch rows.
        groups: of batch rows of every head, independent of each other.
        tiles: of a group, one after another in every step.
        shared_bytes: dynamic shared memory a CTA.
    """

    register_chunks: int
    shared_chunks: int
    blocks: int
    slots: int
    cluster: int
    rooms: int
    columns: int
    groups: int
    tiles: int
    shared_bytes: int

    source = "split.cuh"
    threads = 512
    cooperative = True

    def kernel(self, task: Task, number: str) -> str:
        """Its C++ name, for the number type of this name."""
        shape = (self.register_chunks, self.shared_chunks, self.blocks, self.slots, self.cluster, self.rooms)
        return f"split_{task.direction}<{number}, {task.cell.functor}, {', '.join(map(str, shape))}>"

    def ring_bytes(self, task: Task, hidden: int, heads: int) -> int:
        """The workspace in global memory: the exchanged state of some steps, and its flags."""
        return ring_bytes(heads * self.groups * self.tiles, hidden, self.blocks, self.columns)

    @property
    def _sent_parts(self) -> int:
        """Product warps whose sums belong to another CTA; as many parts come in."""
        return _PRODUCT_WARPS - _PRODUCT_WARPS // self.cluster

    def product_clocks(self) -> float:
        """Of the tensor cores for a tile."""
        from_registers, from_shared = clocks_per_wgmma(BLOCK_ROWS * self.blocks)
        return 2 * CHUNK_STEPS * (self.register_chunks * from_registers + self.shared_chunks * from_shared)

    def shared_memory_clocks(self) -> float:
        """For the bytes that go in and out of shared memory for a tile, at 128 a clock."""
        chunks, part = self.register_chunks + self.shared_chunks, self.blocks * _PART_BYTES
        state = 3 * chunks * chunk_bytes(self.blocks)  # it comes, and both warp groups read it
        weights = 2 * self.shared_chunks * CHUNK_STEPS * STEP_BYTES
        return (state + weights + 2 * (_PRODUCT_WARPS + self._sent_parts) * part) / 128

    def chain_clocks(self) -> float:
        """From a tile's product to its next: nobody else's work shortens it."""
        part, cell_blocks = self.blocks * _PART_BYTES, self.blocks * 2 // self.cluster
        push = 600 + self._sent_parts * part / 16
        counted = self.product_clocks() + 350 + push + 350 + 100 * cell_blocks + 1450 + chunk_bytes(self.blocks) / 55
        # Large tiles have one room for sums, and fetch late: one row of the sixteen.
        return 1.35 * counted + (2500 if self.blocks >= _LARGE else 0)

    def microseconds(self, task: Task) -> float:
        """About how long a step takes on an H200.

        Within 12% of sixteen plans that ``benchmarks.split`` has timed, with two rooms for sums and more waits.
        """
        return (
            max(self.chain_clocks(), self.tiles * (1300 + 0.89 * self.shared_memory_clocks())) / CLOCKS_PER_MICROSECOND
        )


def plans(chip: Chip, batch: int, hidden: int, task: Task, heads: int) -> Iterator[SplitPlan]:
    """Every plan that fits."""
    cell, chunks = task.cell, math.ceil(hidden / CHUNK_DEPTH)
    if chip.capability != (9, 0) or cell.gates != 1 or cell.products != 1 or cell.reads_memory or not cell.additive:
        return
    for cluster in CLUSTERS:
        clusters = math.ceil(hidden / _CLUSTER_UNITS)
        room = chip.clusters(cluster) // (clusters * heads)
        if room == 0 or not cluster <= chunks <= cluster * _MAX_CHUNKS:
            continue
        for blocks in _BLOCKS:
            batch_tiles = math.ceil(batch / (BLOCK_ROWS * blocks))
            tiles = math.ceil(batch_tiles / min(room, batch_tiles))
            sizes = clusters * cluster, math.ceil(batch_tiles / tiles), tiles
            plan = _fit(chip, task, math.ceil(chunks / cluster), blocks, cluster, *sizes)
            if plan is not None:
                yield plan


def _fit(
    chip: Chip, task: Task, chunks: int, blocks: int, cluster: int, columns: int, groups: int, tiles: int
) -> SplitPlan | None:
    """Slots of the ring as many as find room; None where they are too few."""
    own_warps = _PRODUCT_WARPS // cluster
    cell_blocks, rest = divmod(blocks * own_warps, _CELL_WARPS)
    if rest or cell_blocks > _MAX_CELL_BLOCKS:
        return None
    in_registers = min(chunks, _MAX_REGISTER_CHUNKS)
    in_shared = chunks - in_registers
    shared = 2 * in_shared * CHUNK_STEPS * STEP_BYTES
    large = blocks >= _LARGE
    stages = task.inputs + (not large)  # for outputs; of large tiles they go where inputs were
    shared += _CELL_WARPS * stages * cell_blocks * BLOCK_ROWS * _WARP_UNITS * 2
    shared += blocks * BLOCK_ROWS * _WARP_UNITS  # empty words
    shared += 16 + (_PRODUCT_WARPS + _GROUP_WARPS) * 4  # two barriers, and what the warps have done
    room_bytes = _PRODUCT_WARPS * blocks * _PART_BYTES + 8 + 8 * cluster  # for the parts of sums

    def slots_beside(rooms: int) -> int:
        room = (chip.shared_bytes - shared - rooms * room_bytes) // (chunk_bytes(blocks) + 16)
        return min(room - (room == chunks), 2 * chunks)

    # Two rooms, but one where the ring would have no slot more than a tile needs, and is given more by that.
    rooms = 2
    if large or slots_beside(2) <= chunks < slots_beside(1):
        rooms = 1
    slots = slots_beside(rooms)
    if slots < min(2 * chunks, _MIN_SLOTS):
        return None
    shared += rooms * room_bytes + slots * (chunk_bytes(blocks) + 16)
    return SplitPlan(in_registers, in_shared, blocks, slots, cluster, rooms, columns, groups, tiles, shared)

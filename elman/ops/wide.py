"""Plans for the kernels of large batches on Hopper, ``cuda/wide.cuh``: which instantiation and grid suit a problem."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from elman.ops.planning import BLOCK_ROWS, Chip, Task

# What wide_layout.cuh fixes.
_ROWS = 64
CHUNK_DEPTH = 128
CHUNK_STEPS = 8
STEP_BYTES = _ROWS * 16 * 2
_GROUPS = 2
_GROUP_THREADS = 128
_RING_STEPS = 8
_FLAG_BYTES = 128
_PUBLISHERS = 2  # CTAs that publish a chunk, and what the CTAs of a group are a multiple of
_MAX_CHUNKS = 31

#: Blocks of eight batch rows a tile: below two mma.sync does as well, above eight no tile is left to work on meanwhile.
_BLOCKS = range(2, 9)
#: Of registers a thread, beside some 16 for addresses: weights take 32 a chunk, sums 4 a block, the cell 8 a block.
_REGISTERS = 216
_MAX_REGISTER_CHUNKS = 5
CLOCKS_PER_MICROSECOND = 1900


@dataclass(frozen=True)
class WidePlan:
    """One instantiation and its grid; cuda/README.md has the meaning of the numbers.

    Attributes:
        register_chunks, shared_chunks: chunks of 128 columns of the weight that a warp group holds, by where they lie.
        blocks: blocks of 8 batch rows a tile.
        slots: chunks of the state in the ring of a warp group.
        split: 1 where each of two warp groups has tiles of its own, 2 where they share every tile.
        columns: CTAs of a group, which share its batch rows and split the hidden units of a head.
        groups: of batch rows of every head, independent of each other.
        tiles: of a group, one after another in every step.
        shared_bytes: dynamic shared memory a CTA.
    """

    register_chunks: int
    shared_chunks: int
    blocks: int
    slots: int
    split: int
    columns: int
    groups: int
    tiles: int
    shared_bytes: int

    source = "wide.cuh"
    threads = (_GROUPS + 1) * _GROUP_THREADS
    cluster = None
    cooperative = True

    def kernel(self, task: Task, number: str) -> str:
        """Its C++ name, for the number type of this name."""
        shape = (self.register_chunks, self.shared_chunks, self.blocks, self.slots, self.split)
        return f"wide_{task.direction}<{number}, {task.cell.functor}, {', '.join(map(str, shape))}>"

    def ring_bytes(self, task: Task, hidden: int, heads: int) -> int:
        """The workspace in global memory: the exchanged state of some steps, and its flags."""
        return ring_bytes(heads * self.groups * self.tiles, hidden, self.blocks, self.columns)

    def microseconds(self, task: Task) -> float:
        """About how long a step takes on an H100: all tiles, or one and the exchange's latency if that is longer."""
        from_registers, from_shared = clocks_per_wgmma(BLOCK_ROWS * self.blocks)
        if self.split == 1:  # alone, a warp group does not get more out of the tensor cores
            from_registers, from_shared = max(22.0, from_registers), max(22.0, from_shared)
        product = CHUNK_STEPS * self.split * (self.register_chunks * from_registers + self.shared_chunks * from_shared)
        cell_blocks = self.blocks // self.split
        state = self.split * (self.register_chunks + self.shared_chunks) * chunk_bytes(self.blocks)
        chain = 1450 + product + 350 + 100 * cell_blocks + state / 64
        tile = 1.5 * product + 200 if self.split == 1 else product + 1200 + 450 * cell_blocks
        tile += self.split * 100 * max(0, self.blocks - 3)
        chunks = self.register_chunks + self.shared_chunks
        if self.slots < chunks:  # what an H200 took, one shape each: 512 x 1280, 256 x 2048
            tile *= 1.4 - 0.4 * self.slots / chunks if self.split == 1 else 0.9
        return max(chain, self.tiles * tile) / CLOCKS_PER_MICROSECOND


def clocks_per_wgmma(rows: int) -> tuple[float, float]:
    """Of 64 rows of W by so many batch rows, 16 deep, W in registers and in shared memory: two warp groups together."""
    return max(13.0, rows / 2), 16 + rows / 4


def chunk_bytes(blocks: int) -> int:
    """Of the state, for a tile of so many blocks."""
    return blocks * BLOCK_ROWS * CHUNK_DEPTH * 2


def ring_bytes(tiles: int, hidden: int, blocks: int, columns: int) -> int:
    """The exchanged state of some steps and its flags, of all tiles together."""
    return tiles * (_RING_STEPS * math.ceil(hidden / CHUNK_DEPTH) * chunk_bytes(blocks) + columns * _FLAG_BYTES)


def plans(chip: Chip, batch: int, hidden: int, task: Task, heads: int) -> Iterator[WidePlan]:
    """Every plan that fits."""
    cell, columns = task.cell, _PUBLISHERS * math.ceil(hidden / (_PUBLISHERS * _ROWS))
    if chip.capability != (9, 0) or cell.gates != 1 or cell.products != 1 or cell.reads_memory or not cell.additive:
        return
    room = chip.multiprocessors // (columns * heads)
    if room == 0 or columns // _PUBLISHERS > _MAX_CHUNKS:
        return
    for blocks in _BLOCKS:
        batch_tiles = math.ceil(batch / (BLOCK_ROWS * blocks))
        tiles = math.ceil(batch_tiles / min(room, batch_tiles))
        for split in (1, 2):
            plan = _fit(chip, task, columns, blocks, split, math.ceil(batch_tiles / tiles), tiles)
            if plan is not None:
                yield plan


def _fit(chip: Chip, task: Task, columns: int, blocks: int, split: int, groups: int, tiles: int) -> WidePlan | None:
    """Slots of the ring as many as find room; None where they are too few."""
    if blocks % split or columns < _PUBLISHERS * split:
        return None
    chunks, cell_blocks = math.ceil(columns / _PUBLISHERS / split), blocks // split
    in_registers = min(chunks, _MAX_REGISTER_CHUNKS, (_REGISTERS - 4 * blocks - 8 * cell_blocks) // 32)
    in_shared = chunks - in_registers
    shared = split * in_shared * CHUNK_STEPS * STEP_BYTES
    shared += 2 * _GROUPS * cell_blocks * _GROUP_THREADS * 16 if split == 2 else 0  # sums that are swapped
    shared += 8 * (task.inputs + 1) * cell_blocks * BLOCK_ROWS * 32  # inputs and outputs, of eight warps
    shared += blocks * BLOCK_ROWS * _ROWS * 2  # empty words
    slots = min(chunks, (chip.shared_bytes - shared) // (_GROUPS * (chunk_bytes(blocks) + 16)))
    if in_registers < 1 or slots < min(chunks, 3):
        return None
    shared += _GROUPS * slots * (chunk_bytes(blocks) + 16)
    return WidePlan(in_registers, in_shared, blocks, slots, split, columns, groups, tiles, shared)

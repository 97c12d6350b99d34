"""What every plan of a persistent kernel depends on: the GPU, and what is done at a step."""

from __future__ import annotations

from dataclasses import dataclass

from elman.ops.cells import Cell

DIRECTIONS = ("forward", "backward")

# What persistent.cuh and exchange.cuh fix.
THREADS = 512
PRODUCT_WARPS = 8
BLOCK_ROWS = 8
UNIT_DEPTH = 32
UNIT_BYTES = BLOCK_ROWS * UNIT_DEPTH * 2
RING_SLOTS = 8
#: Half the clock: nothing takes as few clocks as it might.
CLOCKS_PER_MICROSECOND = 950

#: Clusters of 1, 2, … CTAs that an H200 runs at a time, where each CTA takes a multiprocessor; measured, the fewest
#: where two differed.
_CLUSTERS = (132, 66, 40, 30, 22, 18, 16, 15, 11, 11, 7, 7, 7, 7, 7, 7)


@dataclass(frozen=True)
class Chip:
    """The GPU's generation, its multiprocessors, and the shared memory in bytes that a block may use."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

    def clusters(self, size: int) -> int:
        """Clusters of so many CTAs that run at a time: other chips are taken to be as an H200, in proportion."""
        return _CLUSTERS[size - 1] * self.multiprocessors // _CLUSTERS[0]


#: A GPU of each architecture: A100, RTX A6000, RTX 4090, H200.
TYPICAL_CHIPS = {
    "sm_80": Chip((8, 0), 108, 163 * 1024),
    "sm_86": Chip((8, 6), 84, 99 * 1024),
    "sm_89": Chip((8, 9), 128, 99 * 1024),
    "sm_90a": Chip((9, 0), 132, 227 * 1024),
}


@dataclass(frozen=True)
class Task:
    """What a kernel does at every step: one direction of one cell.

    Attributes:
        direction: one of ``DIRECTIONS``.
        cell: of ``CELLS``.
    """

    direction: str
    cell: Cell

    @property
    def depth(self) -> int:
        """Of the product, as a multiple of H: the values that a hidden unit publishes."""
        return self.cell.products if self.direction == "backward" else 1

    @property
    def rows(self) -> int:
        """Of the weight that a hidden unit needs."""
        return self.cell.products if self.direction == "forward" else 1

    @property
    def inputs(self) -> int:
        """The values that the cell of a hidden unit reads at a step, in places of 16 bits."""
        if self.direction == "forward":
            return self.cell.gates
        return 1 + self.cell.saved + self.cell.reads_memory + self.cell.logarithmic

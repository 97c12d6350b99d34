"""Small problems for every family of kernels, of few CTAs each: what the sanitizer's launches are recorded from."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.designs import EXCHANGES, SPLIT, WIDE, hopper_plans, low_rank_plans, plans
from benchmarks.sanitize import control
from elman.ops import gated_softmax, loop, matrix_kernels, norm, persistent, scan
from elman.ops.cells import CELLS, FUSED_CELLS
from elman.ops.low_rank import LowRankPlan
from elman.ops.narrow import Plan
from elman.ops.operators import OPERATORS
from elman.ops.persistent import AnyPlan
from elman.ops.planning import BLOCK_ROWS, Chip, Task
from elman.ops.split import SplitPlan
from elman.ops.wide import WidePlan
from tests.ops.problems import Problem, draw, parts
from tests.ops.test_matrix import draw as draw_matrix

# The package has the functions of these names.
banks, short_conv = (importlib.import_module(f"elman.ops.{name}") for name in ("banks", "short_conv"))

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32, torch.float64)
#: Tiles of a group with which each exchange is run: enough for its buffers to come round again.
_TILES = {"PolledRing": 2, "StagedRing2": 3, "StagedRing3": 5, "ClusterPush": 2}


@dataclass(frozen=True)
class Case:
    """A problem for one family of kernels, forward and backward.

    Attributes:
        family: a row of the table; an exchange's is ``persistent`` and its name.
        words: what is drawn.
        run: runs it on a device.
    """

    family: str
    words: str
    run: Callable[[str], None]


def cases(chip: Chip) -> list[Case]:
    """All of them, families by turns, each family's most telling first; before all others the controls."""
    families = [_control_cases("handed over"), _control_cases("racing")]
    families += [_persistent_cases(exchange, chip) for exchange in EXCHANGES]
    families += [
        _hopper_cases("wide", WIDE, chip),
        _hopper_cases("split", SPLIT, chip),
        _low_rank_cases(),
        _diagonal_cases(),
        _loop_cases(),
        _banks_cases(),
        _norm_cases(),
        _scan_cases(),
        _gated_softmax_cases(),
        _short_conv_cases(),
        _matrix_cases(),
    ]
    return [case for turn in itertools.zip_longest(*families) for case in turn if case is not None]


def _control_cases(kind: str) -> list[Case]:
    name = f"control_{kind.replace(' ', '_')}"

    def case(warps: int, buffers: int) -> Case:
        words = f"{warps} + {warps} warps, {buffers} buffers"
        return Case(f"control, {kind}", words, lambda device: control.run(name, warps, buffers, device))

    return [case(*sizes) for sizes in control.SIZES]


def _walk(walk: Any, problem: Problem, operator: str) -> None:
    pre = problem.pre.unsqueeze(2) if problem.pre.ndim == 3 else problem.pre
    made, cell = OPERATORS[operator](*parts(problem.weight)), CELLS[problem.cell]
    h, _, saved = walk.forward(pre, made, problem.bias, parts(problem.h0), problem.reset, cell, True)
    given = (problem.dh, parts(problem.dh_last), h, saved, made, parts(problem.h0), problem.reset, cell)
    walk.backward(*given, problem.h0 is not None)


@dataclass(frozen=True)
class _Shape:
    """Of a problem for the persistent kernels and those for Hopper.

    ``tiles`` None is what the exchange needs to come round, ``shared_bytes`` None all that the GPU has.
    """

    words: str
    seq_len: int = 3
    rows_beyond: int = 3
    hidden: int = 72
    heads: int = 1
    tiles: int | None = None
    blocks: int = 1
    in_shared: bool = False
    shared_bytes: int | None = None
    bare: bool = False
    rank: int | None = None

    def batch(self, tiles: int) -> int:
        """For so many tiles a group; for one there are two groups."""
        return BLOCK_ROWS * self.blocks * max(1, tiles - 1) + self.rows_beyond

    def case(self, family: str, cell: str, dtype: torch.dtype, batch: int, plan: Callable[..., AnyPlan]) -> Case:
        options: dict[str, Any] = {"with_h0": False, "reset_rate": None} if self.bare else {}

        def run(device: str) -> None:
            operator = "low_rank" if self.rank else "dense" if self.heads == 1 else "block_diagonal"
            problem = draw(
                self.seq_len,
                batch,
                self.hidden,
                dtype=dtype,
                device=device,
                cell=cell,
                operator=operator,
                heads=self.heads,
                rank=self.rank,
                with_bias=not CELLS[cell].additive,
                **options,
            )
            with mock.patch.object(persistent, "make_plan", plan):
                _walk(persistent, problem, operator)

        return Case(family, f"{cell} {str(dtype)[6:]}, {self.words}", run)


_SHAPES = (
    _Shape("h0 and resets"),
    _Shape("neither h0 nor resets", seq_len=4, tiles=1, bare=True),
    _Shape("two blocks", blocks=2),
    _Shape("one step", seq_len=1, tiles=1),
    _Shape("two heads of 44 units", hidden=88, heads=2, tiles=1),
)
#: For an LSTM; the registers of cells without memory hold more.
_IN_SHARED = _Shape("weights in shared memory", seq_len=2, hidden=264, tiles=1, in_shared=True)


def _persistent_cases(exchange: str, chip: Chip) -> list[Case]:
    if exchange == "ClusterPush" and chip.capability < (9, 0):
        return []
    cells = ("lstm", "tanh", *(name for name in FUSED_CELLS if name not in ("lstm", "tanh")))
    wanted = [(cell, torch.bfloat16, _SHAPES[0]) for cell in cells[:2]]
    wanted += [(cell, torch.bfloat16, shape) for shape in _SHAPES[1:] for cell in cells[:2]]
    wanted += [("lstm", torch.bfloat16, _IN_SHARED), ("tanh", torch.bfloat16, replace(_IN_SHARED, hidden=520))]
    wanted += [(cell, torch.bfloat16, _SHAPES[0]) for cell in cells[2:]]
    wanted += [(cell, torch.float16, _SHAPES[0]) for cell in cells]

    def case(cell: str, dtype: torch.dtype, shape: _Shape) -> Case:
        tiles = _TILES[exchange] if shape.tiles is None else shape.tiles
        plan = functools.partial(small_plan, exchange, tiles, shape.blocks, shape.in_shared)
        return shape.case(f"persistent {exchange}", cell, dtype, shape.batch(tiles), plan)

    return [case(*one) for one in wanted]


def _smaller(chip: Chip, most: int = 16) -> list[Chip]:
    """The GPU as if it had 1, 2, ... multiprocessors."""
    return [replace(chip, multiprocessors=number) for number in range(1, most + 1)]


def small_plan(
    exchange: str,
    tiles: int,
    blocks: int,
    in_shared: bool,
    chip: Chip,
    batch: int,
    hidden: int,
    task: Task,
    heads: int = 1,
    rank: int = 0,
) -> Plan:
    """A plan of this exchange with few CTAs, more than one a group, as if the GPU were a small one."""
    found = [plan for of in _smaller(chip) for plan in plans(exchange, blocks, of, batch, hidden, task, heads)]

    def dislike(plan: Plan) -> tuple[bool | int, ...]:
        wrong = plan.columns == 1, plan.tiles != tiles, (plan.shared_units > 0) != in_shared
        return *wrong, plan.groups * plan.columns, plan.row_tiles

    return min(found, key=dislike)


@dataclass(frozen=True)
class _Sizes:
    """With which a design of the wide or the split kernels has few CTAs.

    Attributes:
        hidden: of as few chunks as it can do with.
        given_back: of enough to give slots back, and shared memory in which two blocks then have three slots.
        odd: of a number of chunks that two warp groups, or the CTAs of a cluster, do not share evenly.
        heads: of two heads together.
        blocks: more than two; with eight, tiles of the split kernels are large.
        in_shared: of more chunks than registers hold, and blocks; None where that takes too many CTAs.
        fewer: of more chunks than registers hold and than there are slots in so much shared memory; None likewise, and
            where ``given_back`` has fewer slots than chunks.
    """

    hidden: int
    given_back: tuple[int, int]
    odd: int
    heads: int
    blocks: int
    in_shared: tuple[int, int] | None = None
    fewer: tuple[int, int] | None = None


_SIZES = {
    "wide, own tiles": _Sizes(72, (456, 42 * 1024), 328, 136, blocks=3, in_shared=(456, 8)),
    "wide, shared tiles": _Sizes(200, (840, 42 * 1024), 328, 392, blocks=4, in_shared=(1096, 8)),
    "split over 2": _Sizes(200, (456, 36 * 1024), 328, 392, blocks=5, in_shared=(1096, 6), fewer=(1416, 102 * 1024)),
    "split over 4": _Sizes(400, (584, 34 * 1024), 584, 776, blocks=8),
}


def _hopper_shapes(design: str) -> list[_Shape]:
    """The first two of them for every cell and dtype."""
    of = _SIZES[design]
    shape = functools.partial(_Shape, hidden=of.hidden, tiles=3, blocks=2)

    def few_slots(words: str, sizes: tuple[int, int], **options: Any) -> _Shape:
        hidden, shared_bytes = sizes
        return shape(words, hidden=hidden, shared_bytes=shared_bytes, **options)

    shapes = [
        shape("h0 and resets"),
        few_slots("slots given back", of.given_back),
        shape("neither h0 nor resets", seq_len=4, bare=True),
        shape("one tile", seq_len=5, tiles=1),
        shape(f"{of.blocks} blocks", blocks=of.blocks, tiles=2),
        shape("one step", seq_len=1),
        shape("one step, neither h0 nor resets", seq_len=1, tiles=1, bare=True),
        few_slots("slots given back, neither h0 nor resets", of.given_back, bare=True),
        shape("an odd number of chunks", hidden=of.odd),
        shape(f"two heads of {of.heads // 2} units", hidden=of.heads, heads=2, tiles=2),
    ]
    if of.in_shared is not None:
        hidden, blocks = of.in_shared
        shapes.append(shape("weights in shared memory", hidden=hidden, blocks=blocks, tiles=2))
    if of.fewer is not None:
        shapes.append(few_slots("slots given back, fewer than chunks, weights in shared memory", of.fewer))
    return shapes


def _hopper_cases(family: str, designs: Iterable[str], chip: Chip) -> list[Case]:
    """Of the wide kernels, or of those that split the depth over a cluster."""
    if chip.capability != (9, 0):
        return []

    def case(cell: str, dtype: torch.dtype, design: str, shape: _Shape) -> Case:
        tiles = shape.tiles or 1
        plan = functools.partial(small_hopper_plan, design, tiles, shape.blocks, shape.shared_bytes)
        shape = replace(shape, words=f"{design.partition(' ')[2]}, {shape.words}")
        return shape.case(family, cell, dtype, shape.batch(tiles), plan)

    turns = itertools.zip_longest(*([(design, shape) for shape in _hopper_shapes(design)] for design in designs))
    by_turns = [[one for one in turn if one is not None] for turn in turns]
    others = [("softsign", torch.float16), ("tanh", torch.float16), ("softsign", torch.bfloat16)]
    wanted = [("tanh", torch.bfloat16, *one) for turn in by_turns[:2] for one in turn]
    wanted += [(*other, *one) for other in others for turn in by_turns[:2] for one in turn]
    wanted += [("tanh", torch.bfloat16, *one) for turn in by_turns[2:] for one in turn]
    return [case(*one) for one in wanted]


def small_hopper_plan(
    design: str,
    tiles: int,
    blocks: int,
    shared_bytes: int | None,
    chip: Chip,
    batch: int,
    hidden: int,
    task: Task,
    heads: int = 1,
    rank: int = 0,
) -> WidePlan | SplitPlan:
    """A plan of this design with few CTAs, as if the GPU were a small one, with so much shared memory if given."""
    chip = replace(chip, shared_bytes=shared_bytes or chip.shared_bytes)
    found = [plan for of in _smaller(chip, 36) for plan in hopper_plans(design, blocks, of, batch, hidden, task, heads)]
    return min(found, key=lambda plan: (plan.tiles != tiles, plan.groups))


def _low_rank_cases() -> list[Case]:
    shape = functools.partial(_Shape, tiles=2, rank=19)
    shapes = (
        shape("h0 and resets"),
        shape("neither h0 nor resets", seq_len=4, tiles=1, bare=True),
        shape("states asked for ahead", tiles=4),
        shape("two blocks", blocks=2),
        shape("one step", seq_len=1, tiles=1),
        shape("weights in shared memory", seq_len=2, hidden=840, rank=520, tiles=1, in_shared=True),
    )
    cells = [name for name, cell in FUSED_CELLS.items() if cell.products == 1]
    wanted = [("tanh", torch.bfloat16, shape) for shape in shapes]
    wanted += [(cell, dtype, shapes[0]) for dtype in HALVES for cell in cells if (cell, dtype) != wanted[0][:2]]

    def case(cell: str, dtype: torch.dtype, shape: _Shape) -> Case:
        plan = functools.partial(small_low_rank_plan, shape.tiles, shape.blocks, shape.in_shared)
        return shape.case("low_rank", cell, dtype, shape.batch(shape.tiles or 1), plan)

    return [case(*one) for one in wanted]


def small_low_rank_plan(
    tiles: int,
    blocks: int,
    in_shared: bool,
    chip: Chip,
    batch: int,
    hidden: int,
    task: Task,
    heads: int = 1,
    rank: int = 0,
) -> LowRankPlan:
    """A plan with few CTAs, more than one a group, as if the GPU were a small one."""
    found = [plan for of in _smaller(chip) for plan in low_rank_plans(blocks, of, batch, hidden, task, rank)]

    def dislike(plan: LowRankPlan) -> tuple[bool | int, ...]:
        both = plan.shared_units > 0 and plan.rank_shared_units > 0
        wrong = plan.columns == 1, plan.tiles != tiles, both != in_shared, plan.ahead != (tiles > 2)
        return *wrong, plan.groups * plan.columns, plan.row_tiles

    return min(found, key=dislike)


def _diagonal_cases() -> list[Case]:
    def case(cell: str, dtype: torch.dtype, hidden: int, in_slice: bool) -> Case:
        def run(device: str) -> None:
            problem = draw(
                *(5, 3, hidden), dtype=dtype, device=device, cell=cell, operator="diagonal", with_bias=cell == "gru"
            )
            if in_slice:
                wide = torch.zeros(*problem.pre.shape[:-1], hidden + 6, dtype=dtype, device=device)
                problem = replace(problem, pre=wide[..., 3 : hidden + 3].copy_(problem.pre))
            _walk(persistent, problem, "diagonal")

        words = f"{cell} {str(dtype)[6:]}, H = {hidden}" + ", pre a slice" * in_slice
        return Case("diagonal", words, run)

    wanted = [("lstm", torch.bfloat16, 67, True), ("tanh", torch.bfloat16, 66, False)]
    wanted += [(cell, torch.bfloat16, 66, False) for cell in FUSED_CELLS if cell != "tanh"]
    wanted += [(cell, dtype, 66, False) for dtype in DTYPES[1:] for cell in FUSED_CELLS]
    return [case(*one) for one in wanted]


def _loop_cases() -> list[Case]:
    def case(cell: str, dtype: torch.dtype, hidden: int, **options: Any) -> Case:
        def run(device: str) -> None:
            with_bias = not CELLS[cell].additive
            problem = draw(2, 3, hidden, dtype=dtype, device=device, cell=cell, with_bias=with_bias, **options)
            _walk(loop, problem, "dense")

        return Case("step", f"{cell} {str(dtype)[6:]}, H = {hidden}" + ", bare" * bool(options), run)

    bare = {"with_h0": False, "reset_rate": None}
    first = [case("lstm", torch.bfloat16, 67), case("gru", torch.bfloat16, 66, **bare)]
    return first + [case(cell, dtype, 66) for dtype in DTYPES for cell in FUSED_CELLS]


def _banks_cases() -> list[Case]:
    def case(k: int, dtype: torch.dtype, hidden: int, bare: bool) -> Case:
        def run(device: str) -> None:
            generator = torch.Generator().manual_seed(0)

            def normal(*shape: int) -> Tensor:
                return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

            seq_len, batch = 11, 3
            h, z = normal(seq_len, batch, hidden).to(dtype), normal(seq_len, batch, k + 1, hidden).to(dtype)
            real = torch.float64 if dtype == torch.float64 else torch.float32
            decay, m0, dm = (normal(*shape).to(real) for shape in ((k, hidden), *((batch, k, hidden),) * 2))
            reset = (torch.rand(seq_len, batch, generator=generator) < 0.2).to(device)
            decay, m0, dm, reset = decay.sigmoid(), *((None,) * 3 if bare else (m0, dm, reset))
            _, _, checkpoints = banks._forward(h, z, decay, m0, reset, True)
            banks._backward(h, dm, h, z, decay, reset, checkpoints)

        return Case("banks", f"k = {k} {str(dtype)[6:]}, H = {hidden}" + ", bare" * bare, run)

    wanted = [(4, torch.bfloat16, 67, False), (4, torch.bfloat16, 66, True)]
    wanted += [(k, torch.bfloat16, 66, False) for k in (1, 2, 8, 16)] + [(4, dtype, 66, False) for dtype in DTYPES[1:]]
    return [case(*one) for one in wanted]


def _norm_cases() -> list[Case]:
    def case(rows: int, width: int, dtype: torch.dtype, bare: bool) -> Case:
        def run(device: str) -> None:
            generator = torch.Generator().manual_seed(0)
            x, ds, y, dn = (torch.randn(rows, width, generator=generator).to(device) for _ in range(4))
            weight, y, dn = torch.randn(width, generator=generator).to(device), y.to(dtype), dn.to(dtype)
            s, _, r = norm._forward(x, None if bare else y, weight, 1e-6, dtype)
            norm._backward(dn, None if bare else ds, x if bare else s, weight, r, not bare)

        return Case("norm", f"{rows} × {width} {str(dtype)[6:]}" + ", bare" * bare, run)

    # Of the narrowest there are more rows than blocks at a time, on an H200.
    wanted = [(7, 60, torch.bfloat16, False), (3, 8, torch.float32, True), (6000, 4, torch.bfloat16, False)]
    wanted += [(5, width, torch.float16, False) for width in (1280, 2052, 8192)] + [(1, 132, torch.bfloat16, True)]
    return [case(*one) for one in wanted]


def _scan_cases() -> list[Case]:
    def case(seq_len: int, dtype: torch.dtype, hidden: int, bare: bool) -> Case:
        def run(device: str) -> None:
            generator = torch.Generator().manual_seed(0)
            shape = seq_len, 3, hidden
            a, b, dh = (torch.randn(*shape, generator=generator).to(device, dtype) for _ in range(3))
            h0 = torch.randn(*shape[1:], generator=generator).to(device, dtype)
            reset = (torch.rand(*shape[:2], generator=generator) < 0.2).to(device)
            a, *given = a.sigmoid(), *((None, None) if bare else (h0, reset))
            h = scan._forward(a, b, *given)
            scan._backward(dh, a, h, *given)

        return Case("scan", f"T = {seq_len} {str(dtype)[6:]}, H = {hidden}" + ", bare" * bare, run)

    wanted = [(41, torch.bfloat16, 67, False), (41, torch.bfloat16, 66, True), (1, torch.bfloat16, 66, False)]
    wanted += [(41, dtype, 66, False) for dtype in DTYPES] + [(1, torch.float32, 67, True)]
    return [case(*one) for one in wanted]


def _short_conv_cases() -> list[Case]:
    def case(seq_len: int, taps: int, dtype: torch.dtype, hidden: int, bare: bool) -> Case:
        def run(device: str) -> None:
            generator = torch.Generator().manual_seed(0)

            def normal(*shape: int) -> Tensor:
                return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

            u, dv = normal(seq_len, 3, hidden), normal(seq_len, 3, hidden)
            weight = normal(taps, hidden).to(torch.float64 if dtype == torch.float64 else torch.float32)
            last, dleft = normal(3, taps - 1, hidden), normal(3, taps - 1, hidden)
            reset = (torch.rand(seq_len, 3, generator=generator) < 0.2).to(device)
            last, dleft, reset = (None,) * 3 if bare else (last, dleft, reset)
            short_conv._forward(u, weight, last, reset, not bare)
            short_conv._backward(dv, dleft, u, weight, last, reset, not bare)

        return Case("short_conv", f"T = {seq_len}, {taps} taps {str(dtype)[6:]}, H = {hidden}" + ", bare" * bare, run)

    wanted = [(41, 4, torch.bfloat16, 67, False), (70, 4, torch.bfloat16, 68, True), (1, 4, torch.bfloat16, 68, False)]
    wanted += [(41, taps, torch.bfloat16, 68, False) for taps in (2, 8)] + [
        (41, 4, dtype, 68, False) for dtype in DTYPES
    ]
    return [case(*one) for one in wanted]


def _gated_softmax_cases() -> list[Case]:
    def case(rows: int, groups: int, size: int, dtype: torch.dtype) -> Case:
        def run(device: str) -> None:
            generator = torch.Generator().manual_seed(0)
            shape = rows, groups * size
            x, s, dy = (torch.randn(*shape, generator=generator).to(device, dtype) for _ in range(3))
            gated_softmax._forward(x, s, groups)
            gated_softmax._backward(dy, x, s, groups)

        return Case("gated_softmax", f"{rows} × {groups} groups of {size} {str(dtype)[6:]}", run)

    wanted = [(7, 5, 37, torch.bfloat16), (9, 32, 64, torch.bfloat16), (3, 1, 1184, torch.float16)]
    # Of the last there are more tiles than warps at a time, on an H200.
    wanted += [(3, 3, 100, torch.float32), (5, 3, 1, torch.float16), (60000, 16, 8, torch.bfloat16)]
    return [case(*one) for one in wanted]


def _matrix_cases() -> list[Case]:
    def case(shape: tuple[int, ...], cell: str, dtype: torch.dtype, per_key: bool, bare: bool) -> Case:
        def run(device: str) -> None:
            options: dict[str, Any] = {"with_s0": False, "reset_rate": None} if bare else {}
            p = draw_matrix(*shape, per_key=per_key, **options).to(dtype, device)
            given = (p.q, p.k, p.v, p.decay, p.beta)
            _, _, checkpoints = matrix_kernels.forward(*given, p.s0, p.reset, cell, True)
            matrix_kernels.backward(p.dy, None if bare else p.ds, *given, p.reset, checkpoints, cell)

        words = f"{cell} {str(dtype)[6:]}, {' × '.join(map(str, shape))}"
        return Case("matrix", words + ", a decay of each row" * per_key + ", bare" * bare, run)

    # Intervals that are whole and not; heads of one warp, of several, of several blocks; more steps than a ring holds.
    wanted = [((21, 2, 2, 32, 32), "tanh", torch.bfloat16, False, False)]
    wanted += [
        ((37, 1, 2, 64, 64), "tanh", torch.bfloat16, True, False),
        ((1, 1, 1, 16, 16), "tanh", torch.bfloat16, False, True),
    ]
    wanted += [((18, 1, 1, 128, 128), "tanh", dtype, False, False) for dtype in DTYPES[:3]]
    wanted += [((16, 1, 1, *size), "tanh", torch.bfloat16, False, True) for size in ((16, 128), (128, 16), (32, 64))]
    wanted += [
        ((9, 1, 3, 32, 32), cell, dtype, False, False)
        for cell in ("tanh", "softsign", "identity")
        for dtype in DTYPES[:3]
    ]
    return [case(*one) for one in wanted]

"""What the diagonal's kernels are given, checked without a GPU: a launch is run by the loop on the tensors it names."""

import re
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elman.ops import diagonal, fused, loop
from elman.ops.cells import CELLS, FUSED_CELLS, Cell
from elman.ops.cuda.compiler import flatten
from elman.ops.log_space import join, to_log_space
from elman.ops.operators import Diagonal
from tests.ops.problems import Problem, draw, parts


def parameters(direction: str) -> list[str]:
    """The names of a kernel's parameters, in order."""
    found = re.search(rf"diagonal_{direction}\(([^)]*)\)", flatten("diagonal.cuh"))
    assert found is not None
    return [part.split()[-1].lstrip("*") for part in found[1].split(",")]


def run_like_the_kernels(
    direction: str, cell: Cell, h: Tensor, strided: Sequence[Tensor], arguments: Sequence[Tensor | int | None]
) -> None:
    x = dict(zip(parameters(direction), [*arguments, *h.shape], strict=True))
    assert list(x)[-3:] == ["steps", "batch", "hidden"]
    assert arguments[0].stride(-1) == 1
    operator = Diagonal(x["weight"])
    states = [y for y in (x["h0"], x["memory0"]) if y is not None]
    if direction == "forward":
        pre = x["pre"]
        assert (x["pre_step"], x["pre_row"], x["pre_gate"], 1) == pre.stride()
        save = x["saved"] is not None or x["memories"] is not None
        assert x["saved"] is None or not cell.additive
        states_h, last, kept = loop.forward(pre, operator, x["bias"], states, x["reset"], cell, save)
        made = {"h": states_h, **dict(zip(("saved", "memories"), kept, strict=False))}
        made |= {"last_memory": last[0]} if last else {}
        made = {name: value for name, value in made.items() if name != "saved" or x[name] is not None}
    else:
        assert (x["dh_step"], x["dh_row"], 1) == x["dh"].stride()
        kept = x["kept"]
        assert (x["kept_step"], x["kept_row"], x["kept_value"], 1) == kept.stride()
        dlast = [y for y in (x["dh_last"], x["dmemory_last"]) if y is not None]
        previous = torch.cat([states[0][None] if states else torch.zeros_like(x["h"][:1]), x["h"][:-1]])
        if x["reset"] is not None:
            previous = previous.masked_fill(x["reset"][:, :, None], 0)
        if cell.additive:
            kept = kept + F.pad(previous[:, :, None] * x["weight"], (0, 0, 0, cell.gates - cell.products))
        memories = join(*to_log_space(x["h"])) if cell.logarithmic else x["memories"]
        saved = [kept] if memories is None else [kept, memories]
        given = (x["dh"], dlast, x["h"], saved, operator, states, x["reset"], cell, x["dh0"] is not None)
        dpre, drec, _, dstates = loop.backward(*given)
        made = {"dpre": dpre, **dict(zip(("dh0", "dmemory0"), dstates, strict=False))}
        made |= {} if cell.additive else {"drec": drec}
        made["dweight"] = (drec * previous[:, :, None]).sum(0)
    for name, value in made.items():
        x[name].copy_(value)


def results(p: Problem, walk: object) -> list[Tensor]:
    cell, states, operator = CELLS[p.cell], parts(p.h0), Diagonal(p.weight)
    pre = p.pre.unsqueeze(2) if p.pre.ndim == 3 else p.pre
    h, last, saved = walk.forward(pre, operator, p.bias, states, p.reset, cell, True)
    unsaved, last_unsaved, nothing = walk.forward(pre, operator, p.bias, states, p.reset, cell, False)
    assert nothing == []
    assert all(torch.equal(a, b) for a, b in zip((h, *last), (unsaved, *last_unsaved), strict=True))
    given = (p.dh, parts(p.dh_last), h, saved, operator, states, p.reset, cell, p.h0 is not None)
    dpre, drec, _, dstates = walk.backward(*given)
    assert (saved[0] is pre) == (walk is diagonal and cell.additive)
    return [h, *last, dpre, drec, *dstates]


@pytest.mark.parametrize("cell", FUSED_CELLS)
@pytest.mark.parametrize("with_h0", [False, True])
def test_launches_compute_the_recurrence(monkeypatch: pytest.MonkeyPatch, cell: str, with_h0: bool) -> None:
    monkeypatch.setattr(diagonal, "_launch", run_like_the_kernels)
    p = draw(5, 3, 7, cell=cell, operator="diagonal", with_h0=with_h0, with_bias=not CELLS[cell].additive)
    p = p.map(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))
    for ours, expected in zip(results(p, diagonal), results(p, loop), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("cell", ["tanh", "polynomial", "log_polynomial", "lstm", "gru"])
def test_the_op_keeps_what_it_is_given_instead_of_sums(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    monkeypatch.setattr(diagonal, "_launch", run_like_the_kernels)
    rule = CELLS[cell]
    p = draw(5, 3, 8, cell=cell, operator="diagonal", with_bias=not rule.additive)
    pre = (p.pre.unsqueeze(2) if p.pre.ndim == 3 else p.pre).requires_grad_()
    weight, kept = p.weight.requires_grad_(), []
    found = []
    for backend in ("loop", "persistent"):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            h, _ = fused.run(backend, pre, Diagonal(weight), p.bias, parts(p.h0), rule, p.reset)
        found.append(torch.autograd.grad(h, (pre, weight), p.dh))
        assert any(x.data_ptr() == pre.data_ptr() for x in kept) == (backend == "persistent" and rule.additive)
        sums = [x for x in kept if x.ndim == 4 and x.data_ptr() != pre.data_ptr()]
        assert bool(sums) == (backend == "loop" or not rule.additive)
        kept.clear()
    torch.testing.assert_close(*found)
    arguments = (pre, [weight], p.bias, list(parts(p.h0)), p.reset, cell, "diagonal", "persistent", True, None)
    torch.library.opcheck(torch.ops.elman.recurrence.default, arguments)


@pytest.mark.parametrize(
    ("dtype", "hidden", "offset", "width"),
    [
        (torch.bfloat16, 6, 0, 2),
        (torch.bfloat16, 7, 0, 1),
        (torch.float16, 6, 1, 1),
        (torch.float32, 6, 0, 1),
        (torch.float64, 6, 0, 1),
    ],
)
def test_pairs_of_half_types_where_all_is_aligned(dtype: torch.dtype, hidden: int, offset: int, width: int) -> None:
    h = torch.zeros(2, 3, hidden, dtype=dtype)
    shifted = torch.zeros(h.numel() + 2, dtype=dtype)[offset : offset + h.numel()].view(h.shape)
    assert diagonal._width(h, [h], [shifted, 4, None, h]) == width
    assert diagonal._width(h, [h], [h, 4, None, shifted]) == width
    apart = torch.zeros(2, 3, hidden + 1, dtype=dtype)[..., :hidden]
    assert diagonal._width(h, [h, apart], [h, apart]) == 1


def test_names_of_kernels_are_those_that_are_compiled() -> None:
    for dtype, width in ((torch.bfloat16, 2), (torch.bfloat16, 1), (torch.float64, 1)):
        for direction in ("forward", "backward"):
            name = diagonal._name(direction, "tanh", dtype, width)
            assert name in diagonal.module("tanh", dtype).kernels

"""The diagonal's kernels, run by the host thread by thread, behind the op that launches them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from elman.ops import diagonal, recurrence
from elman.ops.backends import BACKENDS
from elman.ops.cells import CELLS, FUSED_CELLS
from tests.ops.cuda.host import HostKernels
from tests.ops.problems import assert_as_exact_as_reference, assert_chunks_equal_one_piece, draw

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    names = [name for cell in FUSED_CELLS for dtype in DTYPES for name in diagonal.module(cell, dtype).kernels]
    return HostKernels(tmp_path_factory.mktemp("kernels"), "diagonal.cuh", names)


@pytest.fixture(autouse=True)
def launched(kernels: HostKernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels, as they are run."""
    names: list[str] = []

    def launch(
        module: Any, name: str, blocks: int, threads: int, arguments: Sequence[Tensor | int | None], device: Any
    ) -> None:
        names.append(name)
        kernels.launch(name, blocks, threads, arguments)

    monkeypatch.setattr(diagonal, "launch", launch)
    monkeypatch.setitem(BACKENDS, "persistent", replace(BACKENDS["persistent"], why_not=lambda problem: None))
    return names


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", FUSED_CELLS)
@pytest.mark.parametrize(
    ("seq_len", "hidden", "with_h0", "reset_rate"), [(1, 5, True, None), (61, 70, True, 0.1), (61, 66, False, None)]
)
def test_the_kernels_err_no_more_than_the_reference(
    launched: list[str],
    seq_len: int,
    hidden: int,
    with_h0: bool,
    reset_rate: float | None,
    cell: str,
    dtype: torch.dtype,
) -> None:
    """Of more steps than two windows have; units in pairs where they can be, and the last block not full."""
    p = draw(
        *(seq_len, 3, hidden),
        dtype=dtype,
        cell=cell,
        operator="diagonal",
        with_h0=with_h0,
        with_bias=True,
        reset_rate=reset_rate,
        scale=0.7,
    )
    assert_as_exact_as_reference(p, "persistent")
    functor, number, width = (
        CELLS[cell].functor,
        diagonal.NUMBERS[dtype],
        2 if dtype == torch.bfloat16 and hidden % 2 == 0 else 1,
    )
    assert launched == [f"diagonal_{way}<{functor}, {number}, {width}>" for way in ("forward", "backward")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_the_sums_of_gradients_are_made_on_the_way(launched: list[str], cell: str, dtype: torch.dtype) -> None:
    p = draw(40, 3, 6, dtype=dtype, cell=cell, operator="diagonal", with_bias=True)
    bias = torch.zeros(CELLS[cell].gates, 6, dtype=torch.float64, requires_grad=True)
    pre = p.pre.requires_grad_()
    h, _ = recurrence(pre, p.weight, p.h0, cell=cell, bias=p.bias, pre_bias=bias, reset=p.reset, backend="persistent")
    dpre, dbias = torch.autograd.grad(h, (pre, bias), p.dh)
    assert len(launched) == 2
    # The gradients that are summed are not rounded, as those in dpre are.
    sums = dpre.double().view(40, 3, *bias.shape).sum((0, 1))
    torch.testing.assert_close(dbias, sums, rtol=1e-12, atol=1e-12 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_chunks_give_the_bits_of_one_piece(cell: str, dtype: torch.dtype) -> None:
    p = draw(40, 2, 6, dtype=dtype, cell=cell, operator="diagonal", with_bias=True)
    assert_chunks_equal_one_piece(p, "persistent", 17)


@pytest.mark.parametrize("cell", ["polynomial", "log_polynomial", "gru"])
def test_what_lies_apart_is_read_where_it_lies(cell: str) -> None:
    p = draw(9, 3, 6, dtype=torch.float32, cell=cell, operator="diagonal", with_bias=True)

    def apart(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 4), torch.nan)
        return wide[..., 2:-2].copy_(x)

    assert p.dh is not None
    assert_as_exact_as_reference(replace(p, pre=apart(p.pre), dh=apart(p.dh)), "persistent")

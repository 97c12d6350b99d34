"""Operators: each is the dense one with a matrix of its form, in every backend, and a wrong weight is named."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import recurrence
from elman.ops.cells import CELLS, FUSED_CELLS
from elman.ops.operators import OPERATORS
from tests.ops.problems import assert_as_exact_as_reference, assert_chunks_equal_one_piece, draw, parts, solve

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
STRUCTURED = [name for name in OPERATORS if name != "dense"]

each_operator = pytest.mark.parametrize("operator", STRUCTURED)
each_cell = pytest.mark.parametrize("cell", FUSED_CELLS)
gpu = pytest.mark.gpu
each_backend = pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [
        pytest.param("reference", "cpu", F64, id="reference"),
        pytest.param("loop", "cpu", F64, id="loop-cpu"),
        pytest.param("loop", "cuda", F64, id="loop-cuda", marks=gpu),
    ],
)
fast = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *(pytest.param("loop", dtype, marks=gpu) for dtype in (F64, F32, BF16, F16)),
        *(pytest.param("persistent", dtype, marks=gpu) for dtype in (F64, F32, BF16, F16)),
    ],
)


def as_matrix(operator: str, weight: tuple[Tensor, ...]) -> Tensor:
    """The dense weight that stands for the same maps."""
    if operator == "low_rank":
        return weight[0] @ weight[1]
    if operator == "diagonal":
        return torch.diag_embed(weight[0])
    blocks = weight[0].unbind(-3)
    if weight[0].ndim == 3:
        return torch.block_diag(*blocks)
    return torch.stack([torch.block_diag(*of_product) for of_product in zip(*blocks, strict=True)])


@each_operator
@each_cell
@each_backend
def test_equals_the_dense_matrix_of_its_form(
    backend: str, device: str, dtype: torch.dtype, operator: str, cell: str
) -> None:
    p = draw(5, 3, 8, dtype=dtype, device=device, cell=cell, operator=operator, heads=4, with_bias=True)
    inputs = {name: x.clone().requires_grad_() for name, x in p.inputs().items()}
    outputs = p.run(backend, inputs)
    given = [p.dh, *parts(p.dh_last)]
    ours = torch.autograd.grad(outputs, list(inputs.values()), given)

    weights = tuple(x for name, x in inputs.items() if name in ("weight", "u", "v"))
    h0 = p.h0 if p.h0 is None or isinstance(p.h0, Tensor) else (inputs["h0"], inputs["c0"])
    h0 = inputs["h0"] if isinstance(h0, Tensor) else h0
    h, last = recurrence(
        inputs["pre"],
        as_matrix(operator, weights),
        h0,
        cell=cell,
        bias=inputs["bias"],
        reset=p.reset,
        backend="reference",
    )
    dense = (h, *parts(last))
    for got, expected in zip(outputs, dense, strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(ours, torch.autograd.grad(dense, list(inputs.values()), given), strict=True):
        torch.testing.assert_close(got, expected)


@each_operator
@each_cell
@each_backend
def test_gradcheck(backend: str, device: str, dtype: torch.dtype, operator: str, cell: str) -> None:
    p = draw(3, 2, 4, dtype=dtype, device=device, cell=cell, operator=operator)
    named = {name: x.requires_grad_() for name, x in p.inputs().items()}
    assert torch.autograd.gradcheck(
        lambda *args: p.run(backend, dict(zip(named, args, strict=True))), list(named.values()), nondet_tol=0.0
    )


@each_operator
@pytest.mark.parametrize("with_h0", [False, True])
def test_half_types_err_no_more_than_the_reference_on_the_cpu(operator: str, with_h0: bool) -> None:
    p = draw(8, 5, 32, dtype=BF16, operator=operator, with_h0=with_h0)
    assert_as_exact_as_reference(p, "loop")


def runs(backend: str, dtype: torch.dtype, operator: str) -> bool:
    """The persistent kernels on matrices are for half types."""
    return backend == "loop" or operator == "diagonal" or dtype in (BF16, F16)


@each_operator
@pytest.mark.parametrize("shape", [(16, 64, 512), (7, 3, 8), (5, 9, 13), (33, 17, 110)])
@fast
def test_errs_no_more_than_the_reference_on_a_gpu(
    backend: str, dtype: torch.dtype, operator: str, shape: tuple[int, int, int]
) -> None:
    if not runs(backend, dtype, operator):
        pytest.skip("half types only")
    seq_len, batch, hidden = shape
    p = draw(seq_len, batch, hidden, dtype=dtype, device="cuda", operator=operator, reset_rate=0.05, heads=4)
    assert_as_exact_as_reference(p, backend)
    assert_as_exact_as_reference(replace(p, h0=None, reset=None), backend)


@each_operator
@each_cell
@pytest.mark.parametrize(("backend", "hidden"), [("loop", 13), ("persistent", 13), ("persistent", 16)])
@gpu
def test_every_cell_errs_no_more_than_the_reference(backend: str, hidden: int, operator: str, cell: str) -> None:
    for with_h0 in (False, True):
        p = draw(6, 4, hidden, dtype=BF16, device="cuda", cell=cell, operator=operator, with_h0=with_h0, with_bias=True)
        assert_as_exact_as_reference(p, backend)


@each_operator
@gpu
def test_bits_and_chunks_on_a_gpu(operator: str) -> None:
    p = draw(33, 8, 64, dtype=BF16, device="cuda", operator=operator)
    for backend in ("loop", "persistent"):
        first, again = solve(p, backend), solve(p, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert_chunks_equal_one_piece(p, backend, 15)


@each_operator
@each_cell
def test_chunks_equal_one_piece(operator: str, cell: str) -> None:
    p = draw(6, 3, 8, cell=cell, operator=operator)
    for backend in ("reference", "loop"):
        assert_chunks_equal_one_piece(p, backend, 4)


@each_operator
def test_autocast_casts_every_weight(operator: str) -> None:
    p = draw(3, 2, 8, dtype=F32, operator=operator)
    weights = tuple(x.requires_grad_() for x in parts(p.weight))
    with torch.autocast("cpu", BF16):
        h, _ = recurrence(p.pre, weights if len(weights) > 1 else weights[0], p.h0)
    assert h.dtype == BF16
    assert all(x.dtype == F32 for x in torch.autograd.grad(h.float().sum(), weights))


@each_operator
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torch_compile_in_one_graph(operator: str) -> None:
    p = draw(4, 3, 8, operator=operator)
    named = {name: x.requires_grad_() for name, x in p.inputs().items()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: p.run("loop", x)[0], fullgraph=True, backend="aot_eager")
    ours, expected = (
        torch.autograd.grad(run(named).sum(), list(named.values())) for run in (compiled, lambda x: p.run("loop", x)[0])
    )
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("cell", "weight", "message"),
    [
        (
            "tanh",
            torch.zeros(5, 6),
            r"weight has shape \(5, 6\), but pre has 6 hidden units and the cell takes 1 recurrent product: "
            r"give \(6, 6\), \(N, 6/N, 6/N\) for N heads, \(6,\) for a diagonal, or a pair of \(6, r\) and \(r, 6\)",
        ),
        ("tanh", torch.zeros(5), r"\(5,\)"),
        ("tanh", torch.zeros(4, 2, 2), r"\(4, 2, 2\)"),
        ("tanh", torch.zeros(2, 3, 2), r"\(2, 3, 2\)"),
        ("tanh", (torch.zeros(6, 2), torch.zeros(3, 6)), r"\(6, 2\) and \(3, 6\)"),
        ("tanh", (torch.zeros(6, 0), torch.zeros(0, 6)), r"\(6, 0\) and \(0, 6\)"),
        (
            "lstm",
            torch.zeros(6, 6),
            r"\(6, 6\), .* 4 recurrent products: give \(4, 6, 6\), \(4, N, 6/N, 6/N\) .* \(4, 6\)",
        ),
        ("lstm", (torch.zeros(6, 2), torch.zeros(4, 2, 6)), r"\(6, 2\) and \(4, 2, 6\)"),
        ("tanh", (torch.zeros(6, 2, dtype=F64), torch.zeros(2, 6)), r"weight\[0\] has dtype torch.float64"),
    ],
)
def test_a_weight_of_no_form_is_named(cell: str, weight: Tensor | tuple[Tensor, Tensor], message: str) -> None:
    gates = () if CELLS[cell].gates == 1 else (CELLS[cell].gates,)
    with pytest.raises(UsageError, match=message):
        recurrence(torch.zeros(2, 3, *gates, 6), weight, cell=cell)

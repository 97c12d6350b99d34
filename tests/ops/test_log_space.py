"""Signed numbers by their logarithms: zeros, signs, extremes, gradients; and the cells that keep their state so."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import recurrence
from elman.ops.cells import CELLS
from elman.ops.log_space import as_joined, as_number, from_log_space, join, signed_logaddexp, split, to_log_space

EXTREMES = [0.0, 1.0, -1.0, 1e30, -1e30, 1e-30, -1e-30, 0.3, -7.0]
T, B, H = 7, 3, 5
CELLS_IN_LOG_SPACE = [name for name, cell in CELLS.items() if cell.logarithmic]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back(dtype: torch.dtype) -> None:
    x = torch.tensor(EXTREMES, dtype=dtype)
    log, sign = to_log_space(x)
    assert sign.tolist() == [0, 1, -1, 1, -1, 1, -1, 1, -1]
    assert log.isfinite().all()
    # The logarithm of 1e30 is 69, whose last place is 2^6 times that of 1.
    torch.testing.assert_close(from_log_space(log, sign), x, rtol=64 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_every_pair(dtype: torch.dtype) -> None:
    a, b = torch.tensor(list(itertools.product(EXTREMES, EXTREMES)), dtype=dtype).unbind(1)
    log, sign = signed_logaddexp(to_log_space(a), to_log_space(b))
    exact = a.double() + b.double()
    assert torch.equal(sign.double(), exact.sign())
    # What rounds are the logarithms: relative to the larger term, not to the sum.
    error = (from_log_space(log, sign).double() - exact).abs() / torch.maximum(a.abs(), b.abs()).clamp_min(1e-38)
    assert error.max() <= 128 * torch.finfo(dtype).eps


def test_sums_below_what_the_linear_numbers_hold() -> None:
    """e^-200 is 0 in float32; its logarithm is not, and sums of such numbers have theirs."""
    small, smaller, one = torch.tensor([-200.0]), torch.tensor([-201.0]), torch.ones(1)
    log, sign = signed_logaddexp((small, one), (smaller, -one))
    assert sign.item() == 1
    assert log.item() == pytest.approx(-200 + torch.log1p(-torch.exp(torch.tensor(-1.0))).item())
    log, _ = signed_logaddexp((small, one), (small, one))
    assert log.item() == pytest.approx(-200 + 0.6931472)


def test_nearly_equal_terms_cancel_precisely() -> None:
    gap = torch.tensor([1e-3, 1e-6, 1e-9, 1.0, 40.0], dtype=torch.float64)
    zero, one = torch.zeros_like(gap), torch.ones_like(gap)
    log, sign = signed_logaddexp((-gap, one), (zero, -one))
    assert (sign == -1).all()
    torch.testing.assert_close(log, torch.log(-torch.expm1(-gap)), rtol=1e-14, atol=1e-16)
    log, sign = signed_logaddexp((zero, one), (zero, -one))
    assert (log == 0).all()
    assert (sign == 0).all()


def test_gradients_are_true_ones() -> None:
    """Through both forms and the sum they are those of a + b; at zeros and where terms cancel they are finite."""
    pairs = [pair for pair in itertools.product([0.5, -0.5, 2.0, -3.0, 1e-3, 40.0], repeat=2) if sum(pair) != 0]
    a, b = (x.requires_grad_() for x in torch.tensor(pairs, dtype=torch.float64).unbind(1))

    def add(a: Tensor, b: Tensor) -> Tensor:
        return from_log_space(*signed_logaddexp(to_log_space(a), to_log_space(b)))

    assert torch.autograd.gradcheck(add, (a, b))
    for gradient in torch.autograd.grad(add(a, b).sum(), (a, b)):
        torch.testing.assert_close(gradient, torch.ones_like(gradient))
    a, b = (torch.tensor(x, requires_grad=True) for x in ([0.0, 0.0, 1.5, 2.0], [0.0, 1.5, 0.0, -2.0]))
    gradients = torch.autograd.grad(add(a, b).sum(), (a, b))
    assert [x.tolist() for x in gradients] == [[0, 0, 1, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_in_one_number(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 0.3, -0.3, 1e-30, -1e-30], dtype=dtype)
    log, sign = to_log_space(x)
    joined = join(log, sign)
    again, signs = split(joined)
    assert torch.equal(signs, sign)
    torch.testing.assert_close(again, log, rtol=0, atol=1e-37)
    assert torch.equal(from_log_space(again, signs), from_log_space(log, sign))
    # What no linear number holds; and a magnitude above 1, which only rounding makes.
    log, sign = (torch.tensor(values, dtype=dtype) for values in ([-2000.0, -3e4, 1e-7, 0.0], [1, -1, -1, 1]))
    again, signs = split(join(log, sign))
    assert torch.equal(signs, sign)
    torch.testing.assert_close(again, log.clamp_max(0), rtol=0, atol=1e-37)


def test_gradients_go_through_one_number() -> None:
    x = torch.tensor([0.5, -0.25, 1e-3], dtype=torch.float64, requires_grad=True)
    joined = join(*to_log_space(x))
    (gradient,) = torch.autograd.grad(from_log_space(*split(joined)).sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))
    codes = torch.tensor([0.5, -3.0, 40.0, 0.0], dtype=torch.float64, requires_grad=True)
    held = as_number(codes)
    again = as_joined(held)
    assert torch.equal(held, codes)
    assert torch.equal(again, codes)
    assert [x.tolist() for x in torch.autograd.grad(again.sum(), (held, codes), retain_graph=True)[1:]] == [
        [1, 1, 1, 0]
    ]
    assert torch.autograd.gradcheck(lambda x: from_log_space(*split(x)), codes[:3].detach().requires_grad_())


def inputs(cell: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pre, weight, h0 and reset, in float64."""
    generator = torch.Generator().manual_seed(0)
    rule = CELLS[cell]
    front = () if rule.products == 1 else (rule.products,)
    pre = torch.randn(T, B, rule.gates, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(*front, H, H, generator=generator, dtype=torch.float64) / H**0.5
    h0 = torch.randn(B, H, generator=generator, dtype=torch.float64).tanh()
    return pre, weight, h0, torch.rand(T, B, generator=generator) < 0.2


def run(
    cell: str, pre: Tensor, weight: Tensor, h0: Tensor | None, reset: Tensor | None = None, backend: str = "reference"
) -> Tensor:
    start = None if h0 is None else (h0, join(*to_log_space(h0)))
    h, (last, memory) = recurrence(pre, weight, start, cell=cell, reset=reset, backend=backend)
    assert torch.equal(from_log_space(*split(memory)), last)
    assert torch.equal(last, h[-1])
    return h


@pytest.mark.parametrize("backend", ["reference", "loop"])
@pytest.mark.parametrize("cell", ["log_delta", "log_triple_r"])
def test_a_cell_in_log_space_is_the_linear_one_with_its_gradients(cell: str, backend: str) -> None:
    pre, weight, h0, reset = inputs(cell)
    wanted = [x.requires_grad_() for x in (pre, weight, h0)]
    ours = run(cell, *wanted, reset, backend)
    theirs, _ = recurrence(pre, weight, h0, cell=cell.removeprefix("log_"), reset=reset)
    torch.testing.assert_close(ours, theirs)
    dh = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.autograd.grad(ours, wanted, dh), torch.autograd.grad(theirs, wanted, dh))


@pytest.mark.parametrize("backend", ["reference", "loop"])
def test_the_polynomial_cell_in_log_space_is_its_equation_with_its_gradients(backend: str) -> None:
    pre, weight, h0, _ = inputs("log_polynomial")
    wanted = [x.requires_grad_() for x in (pre, weight, h0)]
    h, outputs = h0, []
    for a, d, e in (pre_t.unbind(1) for pre_t in pre):
        v, alpha = a + h @ weight.T, 1 + torch.log1p(torch.exp(e))
        power = v.abs() ** alpha
        h = torch.sigmoid(-d) * h + torch.sigmoid(d) * v.sign() * power / (1 + power)
        outputs.append(h)
    ours, theirs = run("log_polynomial", *wanted, backend=backend), torch.stack(outputs)
    torch.testing.assert_close(ours, theirs)
    dh = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.autograd.grad(ours, wanted, dh), torch.autograd.grad(theirs, wanted, dh))


@pytest.mark.parametrize("cell", CELLS_IN_LOG_SPACE)
def test_chunks_and_resets_carry_the_logarithms(cell: str) -> None:
    pre, weight, h0, reset = inputs(cell)
    h, last = recurrence(pre, weight, (h0, join(*to_log_space(h0))), cell=cell, reset=reset)
    state, pieces = (h0, join(*to_log_space(h0))), []
    for part in (slice(0, 3), slice(3, T)):
        piece, state = recurrence(pre[part], weight, state, cell=cell, reset=reset[part])
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces), h)
    assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))
    fresh, _ = recurrence(pre[4:], weight, cell=cell)
    cut = torch.zeros(T, B, dtype=torch.bool)
    cut[4] = True
    assert torch.equal(run(cell, pre, weight, h0, cut)[4:], fresh)


@pytest.mark.parametrize("backend", ["reference", "loop"])
@pytest.mark.parametrize("cell", CELLS_IN_LOG_SPACE)
def test_a_state_that_no_linear_number_holds_goes_on(backend: str, cell: str) -> None:
    """Without anything new it loses log (1 − δ) a step, whatever there is of it; and the next input ends that."""
    gates = CELLS[cell].gates
    pre = torch.zeros(4, 1, gates, 1, dtype=torch.float32)
    pre[3, 0, 0] = 1.0
    weight = torch.zeros(CELLS[cell].products, 1, dtype=torch.float32).squeeze(0)
    weight = weight.view(-1, 1) if CELLS[cell].products > 1 else weight.view(1)
    start = torch.zeros(1, 1), torch.full((1, 1), -200.0)
    given = pre.clone().requires_grad_()
    h, (_, memory) = recurrence(given[:3], weight, start, cell=cell, backend=backend)
    assert (h == 0).all()
    torch.testing.assert_close(memory, torch.full((1, 1), -200 - 3 * math.log(2)))
    h, _ = recurrence(given, weight, start, cell=cell, backend=backend)
    expected = 0.5 * (math.tanh(1) if gates == 2 else 0.5)
    assert h[-1].item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.grad(h.sum(), given)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "loop"])
@pytest.mark.parametrize("cell", ["log_delta", "log_triple_r"])
def test_zeros_and_ones_have_the_slopes_of_the_linear_cell(backend: str, cell: str) -> None:
    """A candidate that is exactly 0, a state that is, and one that is 1 to rounding."""
    products = CELLS[cell].products
    pre = torch.zeros(5, 1, 2, 3, dtype=torch.float64)
    pre[1:, 0, 0, 1:], pre[2:, 0, 1, 2] = torch.tensor([0.5, 40.0]), 60.0
    weight = torch.full((products, 3, 3), 0.0, dtype=torch.float64).view(-1, 3, 3)[: products or 1]
    weight = weight if products > 1 else weight[0]
    results = []
    for name, by in ((cell, backend), (cell.removeprefix("log_"), "reference")):
        wanted = [pre.clone().requires_grad_(), weight.clone().requires_grad_()]
        h, _ = recurrence(*wanted, cell=name, backend=by)
        results.append([h, *torch.autograd.grad(h, wanted, torch.linspace(1, 2, 15, dtype=h.dtype).view_as(h))])
    assert (results[0][1][0, 0, 0] > 0).all()
    torch.testing.assert_close(results[0], results[1])


def test_the_memory_is_of_float32_beside_half_types() -> None:
    pre, weight, h0, reset = inputs("log_delta")
    half = [x.to(torch.bfloat16) for x in (pre, weight, h0)]
    memory = join(*to_log_space(h0)).float()
    h, (last, after) = recurrence(*half[:2], (half[2], memory), cell="log_delta", reset=reset)
    assert (h.dtype, last.dtype, after.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    with pytest.raises(UsageError, match=r"h0\[1\] has dtype torch.bfloat16 .*cell='log_delta' wants torch.float32"):
        recurrence(*half[:2], (half[2], memory.bfloat16()), cell="log_delta")
    with torch.autocast("cpu", torch.bfloat16):
        _, (last, after) = recurrence(pre.float(), weight.float(), (h0.float(), memory), cell="log_delta")
    assert (last.dtype, after.dtype) == (torch.bfloat16, torch.float32)

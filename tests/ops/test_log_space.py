"""Signed numbers by their logarithms: zeros, signs, extremes, gradients; and the cells that keep their state so."""

import itertools

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import recurrence
from elman.ops.cells import CELLS
from elman.ops.log_space import from_log_space, signed_logaddexp, to_log_space

EXTREMES = [0.0, 1.0, -1.0, 1e30, -1e30, 1e-30, -1e-30, 0.3, -7.0]
T, B, H = 7, 3, 5


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


def inputs(cell: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pre, weight, h0 and reset, in float64."""
    generator = torch.Generator().manual_seed(0)
    rule = CELLS[cell]
    front = () if rule.products == 1 else (rule.products,)
    pre = torch.randn(T, B, rule.gates, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(*front, H, H, generator=generator, dtype=torch.float64) / H**0.5
    h0 = torch.randn(B, H, generator=generator, dtype=torch.float64).tanh()
    return pre, weight, h0, torch.rand(T, B, generator=generator) < 0.2


def run(cell: str, pre: Tensor, weight: Tensor, h0: Tensor | None, reset: Tensor | None = None) -> Tensor:
    start = None if h0 is None else (h0, *to_log_space(h0))
    h, (last, log, sign) = recurrence(pre, weight, start, cell=cell, reset=reset)
    assert torch.equal(from_log_space(log, sign), last)
    assert torch.equal(last, h[-1])
    return h


@pytest.mark.parametrize("cell", ["log_delta", "log_triple_r"])
def test_a_cell_in_log_space_is_the_linear_one_with_its_gradients(cell: str) -> None:
    pre, weight, h0, reset = inputs(cell)
    wanted = [x.requires_grad_() for x in (pre, weight, h0)]
    ours = run(cell, *wanted, reset)
    theirs, _ = recurrence(pre, weight, h0, cell=cell.removeprefix("log_"), reset=reset)
    torch.testing.assert_close(ours, theirs)
    dh = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.autograd.grad(ours, wanted, dh), torch.autograd.grad(theirs, wanted, dh))


def test_the_polynomial_cell_in_log_space_is_its_equation_with_its_gradients() -> None:
    pre, weight, h0, _ = inputs("log_polynomial")
    wanted = [x.requires_grad_() for x in (pre, weight, h0)]
    h, outputs = h0, []
    for a, d, e in (pre_t.unbind(1) for pre_t in pre):
        v, alpha = a + h @ weight.T, 1 + torch.log1p(torch.exp(e))
        power = v.abs() ** alpha
        h = torch.sigmoid(-d) * h + torch.sigmoid(d) * v.sign() * power / (1 + power)
        outputs.append(h)
    ours, theirs = run("log_polynomial", *wanted), torch.stack(outputs)
    torch.testing.assert_close(ours, theirs)
    dh = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.autograd.grad(ours, wanted, dh), torch.autograd.grad(theirs, wanted, dh))


@pytest.mark.parametrize("cell", ["log_delta", "log_triple_r", "log_polynomial"])
def test_chunks_and_resets_carry_the_logarithms(cell: str) -> None:
    pre, weight, h0, reset = inputs(cell)
    h, last = recurrence(pre, weight, (h0, *to_log_space(h0)), cell=cell, reset=reset)
    state, pieces = (h0, *to_log_space(h0)), []
    for part in (slice(0, 3), slice(3, T)):
        piece, state = recurrence(pre[part], weight, state, cell=cell, reset=reset[part])
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces), h)
    assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))
    fresh, _ = recurrence(pre[4:], weight, cell=cell)
    cut = torch.zeros(T, B, dtype=torch.bool)
    cut[4] = True
    assert torch.equal(run(cell, pre, weight, h0, cut)[4:], fresh)


@pytest.mark.parametrize("backend", ["loop", "persistent"])
def test_the_other_backends_say_that_they_do_not_run_them(backend: str) -> None:
    pre, weight, _, _ = inputs("log_delta")
    with pytest.raises(UsageError, match=f"backend='{backend}' cannot run this problem"):
        recurrence(pre, weight, cell="log_delta", backend=backend)

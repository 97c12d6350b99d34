"""The reference recurrence against torch.nn.RNN, gradcheck, and its own contract."""

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import recurrence
from elman.ops.cells import CELLS

T, B, H = 7, 3, 5


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pre": torch.randn(T, B, H, generator=generator, dtype=dtype),
        "weight": torch.randn(H, H, generator=generator, dtype=dtype) / H**0.5,
        "h0": torch.randn(B, H, generator=generator, dtype=dtype).tanh(),
        "reset": torch.rand(T, B, generator=generator) < 0.3,
    }


def test_equals_torch_rnn_with_the_same_weights() -> None:
    p = problem()
    rnn = torch.nn.RNN(4, H, dtype=torch.float64)
    x = torch.randn(T, B, 4, dtype=torch.float64)
    expected, expected_last = rnn(x, p["h0"].unsqueeze(0))
    pre = torch.nn.functional.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0 + rnn.bias_hh_l0)
    h, h_last = recurrence(pre, rnn.weight_hh_l0, p["h0"])
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(h_last, expected_last[0])

    loss = (h * torch.arange(H)).sum() + h_last.square().sum()
    expected_loss = (expected * torch.arange(H)).sum() + expected_last.square().sum()
    parameters = list(rnn.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected_loss, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("with_reset", [False, True])
def test_gradcheck_of_every_input(cell: str, with_reset: bool) -> None:
    p = problem(1)
    reset = p["reset"] if with_reset else None
    inputs = [p[name].requires_grad_() for name in ("pre", "weight", "h0")]
    assert torch.autograd.gradcheck(lambda *args: recurrence(*args, cell=cell, reset=reset), inputs)


def test_softsign_is_v_over_one_plus_abs_v() -> None:
    p = problem(2)
    h, _ = recurrence(p["pre"][:1], p["weight"], p["h0"], cell="softsign")
    v = p["pre"][0] + p["h0"] @ p["weight"].T
    torch.testing.assert_close(h[0], v / (1 + v.abs()))


def test_absent_h0_is_zero() -> None:
    p = problem(3)
    given, _ = recurrence(p["pre"], p["weight"], torch.zeros_like(p["h0"]))
    absent, _ = recurrence(p["pre"], p["weight"])
    assert torch.equal(given, absent)


@pytest.mark.parametrize("cut", range(1, T))
def test_chunks_with_carried_state_equal_one_piece(cut: int) -> None:
    p = problem(4)
    whole, whole_last = recurrence(p["pre"], p["weight"], p["h0"], reset=p["reset"])
    first, carried = recurrence(p["pre"][:cut], p["weight"], p["h0"], reset=p["reset"][:cut])
    second, last = recurrence(p["pre"][cut:], p["weight"], carried, reset=p["reset"][cut:])
    assert torch.equal(whole, torch.cat([first, second]))
    assert torch.equal(whole_last, last)


@pytest.mark.parametrize("at", range(T))
def test_a_reset_equals_a_fresh_sequence(at: int) -> None:
    p = problem(5)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[at, 1] = True
    h, _ = recurrence(p["pre"], p["weight"], p["h0"], reset=reset)
    fresh, _ = recurrence(p["pre"][at:], p["weight"])
    kept, _ = recurrence(p["pre"], p["weight"], p["h0"])
    torch.testing.assert_close(h[at:, 1], fresh[:, 1])
    assert torch.equal(h[:, [0, 2]], kept[:, [0, 2]])


def test_a_reset_stops_nan_and_gradients() -> None:
    p = problem(6)
    h0 = p["h0"].clone().requires_grad_()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0, 0] = True
    h, _ = recurrence(p["pre"], p["weight"], torch.where(torch.arange(B)[:, None] == 0, torch.nan, h0), reset=reset)
    assert h.isfinite().all()
    (gradient,) = torch.autograd.grad(h.sum(), h0)
    assert (gradient[0] == 0).all()
    assert (gradient[1:] != 0).any()


def test_autocast_casts_every_input() -> None:
    p = problem(7, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, h_last = recurrence(p["pre"].bfloat16(), p["weight"], p["h0"])
    assert h.dtype == h_last.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": torch.zeros(3, 4)}, r"pre has shape \(3, 4\): give \(T, B, H\)"),
        ({"pre": torch.zeros(0, B, H)}, "at least 1"),
        ({"pre": torch.zeros(T, B, H, dtype=torch.long)}, "floating-point"),
        ({"weight": torch.zeros(H, H + 1, dtype=torch.float64)}, r"weight has shape \(5, 6\)"),
        ({"weight": torch.zeros(H, H, dtype=torch.float32)}, "weight has dtype torch.float32"),
        ({"h0": torch.zeros(B, H + 1)}, r"h0 has shape \(3, 6\): give \(B, H\) = \(3, 5\)"),
        ({"reset": torch.zeros(T, B)}, "torch.bool"),
        ({"reset": torch.zeros(B, T, dtype=torch.bool)}, r"\(T, B\) = \(7, 3\)"),
        ({"weight": torch.zeros(H, H, dtype=torch.float64, device="meta")}, "weight is on meta"),
        ({"cell": "relu"}, "cell='relu' is unknown: choose one of tanh, softsign"),
        ({"backend": "cudnn"}, "backend='cudnn' is unknown: choose auto or one of reference"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recurrence(**{**problem(), **change})

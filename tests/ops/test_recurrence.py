"""The reference recurrence against PyTorch's own layers, gradcheck, and its own contract."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import recurrence
from elman.ops.cells import CELLS, FUSED_CELLS
from tests.ops.problems import assert_chunks_equal_one_piece, draw, parts

T, B, H = 7, 3, 5


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pre": torch.randn(T, B, H, generator=generator, dtype=dtype),
        "weight": torch.randn(H, H, generator=generator, dtype=dtype) / H**0.5,
        "h0": torch.randn(B, H, generator=generator, dtype=dtype).tanh(),
        "reset": torch.rand(T, B, generator=generator) < 0.3,
    }


@pytest.mark.parametrize(
    ("cell", "module"),
    [
        ("tanh", torch.nn.RNN),
        ("relu", functools.partial(torch.nn.RNN, nonlinearity="relu")),
        ("lstm", torch.nn.LSTM),
        ("gru", torch.nn.GRU),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "loop"])
def test_equals_torch_with_the_same_weights(cell: str, module: Callable[..., torch.nn.RNNBase], backend: str) -> None:
    """Every value, and the gradients of inputs, weights, both biases and initial states."""
    torch.manual_seed(0)
    rule = CELLS[cell]
    rnn = module(4, H, dtype=torch.float64)
    x = torch.randn(T, B, 4, dtype=torch.float64, requires_grad=True)
    first = tuple(torch.randn(B, H, dtype=torch.float64, requires_grad=True) for _ in range(rule.states))
    given = tuple(state.unsqueeze(0) for state in first)
    expected, expected_last = rnn(x, given[0] if rule.states == 1 else given)

    pre = torch.nn.functional.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0)
    weight, bias = rnn.weight_hh_l0, rnn.bias_hh_l0.view(rule.products, H)
    if rule.gates > 1:
        pre, weight = pre.view(T, B, rule.gates, H), weight.view(rule.products, H, H)
    h0 = first[0] if rule.states == 1 else first
    h, last = recurrence(pre, weight, h0, cell=cell, bias=bias, backend=backend)

    ours, theirs = (h, *parts(last)), (expected, *(state[0] for state in parts(expected_last)))
    torch.testing.assert_close(ours, theirs)
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in ours]
    wanted = [x, *first, *rnn.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(ours, wanted, gradients), torch.autograd.grad(theirs, wanted, gradients)
    )


def test_delta_and_triple_r_are_their_equations() -> None:
    """variants of the ladder: one learned rate a unit, without and with a recurrent product of its own."""
    for cell in ("delta", "triple_r"):
        p = draw(T, B, H, cell=cell, reset_rate=None)
        h, outputs = p.h0, []
        for a, d in (pre_t.unbind(1) for pre_t in p.pre):
            w, *r = p.weight.view(-1, H, H)
            rate = 1 / (1 + torch.exp(-(d + (h @ r[0].T if r else 0))))
            h = (1 - rate) * h + rate * torch.tanh(a + h @ w.T)
            outputs.append(h)
        ours, last = p.run("reference")
        torch.testing.assert_close(ours, torch.stack(outputs))
        assert torch.equal(last, ours[-1])


def test_polynomial_is_its_equation_and_flat_beyond_one() -> None:
    p = draw(T, B, H, cell="polynomial", operator="diagonal", reset_rate=None)
    h, outputs = p.h0, []
    for v, d, e in (pre_t.unbind(1) for pre_t in p.pre):
        c = (v + p.weight * h).clamp(-1, 1)
        rate = 1 / (1 + torch.exp(-d))
        h = (1 - rate) * h + rate * c.sign() * math.e * (c.abs() / math.e) ** (1 + torch.log1p(torch.exp(e)))
        outputs.append(h)
    torch.testing.assert_close(p.run("reference")[0], torch.stack(outputs))
    pre = torch.tensor([0.0, 0.5, 1.5, -1.5], dtype=torch.float64)
    gates = torch.stack([pre, torch.ones(4), torch.ones(4)]).double().view(1, 1, 3, 4)
    for backend in ("reference", "loop"):
        given = gates.clone().requires_grad_()
        h, _ = recurrence(given, torch.zeros(4, dtype=torch.float64), cell="polynomial", backend=backend)
        (gradient,) = torch.autograd.grad(h.sum(), given)
        assert gradient.isfinite().all()
        assert (gradient[0, 0, 0] != 0).tolist() == [False, True, False, False]
        assert (gradient[0, 0, 2] != 0).tolist() == [False, True, True, True]


def test_the_polynomial_never_stretches() -> None:
    """Whatever its exponent: fed back to itself by a diagonal of 1 it neither grows nor lets gradients grow."""
    v = torch.linspace(-2, 2, 401, dtype=torch.float64).expand(8, 401).clone().requires_grad_()
    exponent = torch.linspace(-6, 30, 8, dtype=torch.float64).view(8, 1).expand(8, 401)
    pre = torch.stack((v, torch.full_like(v, 50), exponent), dim=1).unsqueeze(0)
    h, _ = recurrence(pre, torch.zeros(401, dtype=torch.float64), cell="polynomial")
    (slope,) = torch.autograd.grad(h.sum(), v)
    assert h.abs().max() <= 1
    assert 0.99 < slope.max() <= 1


@pytest.mark.parametrize("cell", FUSED_CELLS)
@pytest.mark.parametrize("reset_rate", [None, 0.3])
def test_gradcheck_of_every_input(cell: str, reset_rate: float | None) -> None:
    p = draw(4, 2, 3, seed=1, cell=cell, with_bias=True, reset_rate=reset_rate)
    inputs = {name: x.requires_grad_() for name, x in p.inputs().items()}
    assert torch.autograd.gradcheck(
        lambda *args: p.run("reference", dict(zip(inputs, args, strict=True))), list(inputs.values())
    )


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


@pytest.mark.parametrize("cell", FUSED_CELLS)
@pytest.mark.parametrize("cut", range(1, T))
def test_chunks_with_carried_state_equal_one_piece(cell: str, cut: int) -> None:
    p = draw(T, B, H, seed=4, cell=cell)
    assert_chunks_equal_one_piece(p, "reference", cut)


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
        ({"pre": torch.zeros(T, B, 3, H)}, r"give \(T, B, H\) for cell='tanh'"),
        ({"cell": "gru"}, r"pre has shape \(7, 3, 5\): give \(T, B, 3, H\) for cell='gru'"),
        (
            {"cell": "gru", "pre": torch.zeros(T, B, 3, H, dtype=torch.float64)},
            r"the cell takes 3 recurrent products: give \(3, 5, 5\)",
        ),
        ({"h0": (torch.zeros(B, H), torch.zeros(B, H))}, "h0 has 2 tensors: give one for cell='tanh'"),
        ({"weight": None}, "weight is a NoneType: give one tensor or several"),
        ({"h0": ("zeros",)}, "h0 holds a str: give one tensor or several"),
        ({"reset": [True]}, "reset is a list: give a tensor"),
        ({"bias": torch.zeros(H)}, r"bias has shape \(5,\): give \(P, H\) = \(1, 5\)"),
        ({"bias": torch.zeros(1, H, dtype=torch.float32)}, "bias has dtype torch.float32"),
        ({"pre": torch.zeros(T, B, H, dtype=torch.long)}, "floating-point"),
        ({"weight": torch.zeros(H, H + 1, dtype=torch.float64)}, r"weight has shape \(5, 6\)"),
        ({"weight": torch.zeros(H, H, dtype=torch.float32)}, "weight has dtype torch.float32"),
        ({"h0": torch.zeros(B, H + 1)}, r"h0 has shape \(3, 6\): give \(B, H\) = \(3, 5\)"),
        ({"reset": torch.zeros(T, B)}, "torch.bool"),
        ({"reset": torch.zeros(B, T, dtype=torch.bool)}, r"\(T, B\) = \(7, 3\)"),
        ({"weight": torch.zeros(H, H, dtype=torch.float64, device="meta")}, "weight is on meta"),
        ({"cell": "elu"}, "cell='elu' is unknown: choose one of tanh, relu"),
        ({"backend": "cudnn"}, "backend='cudnn' is unknown: choose auto or one of reference"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recurrence(**{**problem(), **change})


@pytest.mark.parametrize("backend", ["reference", "loop"])
@pytest.mark.parametrize("cell", ["tanh", "gru", "log_polynomial"])
def test_a_bias_that_pre_holds_has_the_gradient_it_would_have_had(cell: str, backend: str) -> None:
    gates = CELLS[cell].gates
    p = draw(T, B, H, cell=cell, with_bias=True)
    bias = torch.randn(gates, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rest = {"cell": cell, "bias": p.bias, "reset": p.reset, "backend": backend}
    pre = p.pre.view(T, B, gates, H)

    def shaped(x: Tensor) -> Tensor:
        return x.view(p.pre.shape)

    h, _ = recurrence(shaped(pre + bias), p.weight, p.h0, **rest)
    ours, _ = recurrence(shaped(pre + bias.detach()), p.weight, p.h0, pre_bias=bias, **rest)
    assert torch.equal(h, ours)
    torch.testing.assert_close(*(torch.autograd.grad(x, bias, p.dh) for x in (h, ours)))
    with pytest.raises(UsageError, match=rf"pre_bias has shape \(1, 3\) on cpu: give \(G, H\) = \({gates}, {H}\)"):
        recurrence(p.pre, p.weight, p.h0, pre_bias=torch.zeros(1, 3), **rest)

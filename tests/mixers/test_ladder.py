"""The rungs against twins: their equations in numpy, one step and one row at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from elman.errors import UsageError
from elman.mixers import mixer_config, parse_pattern
from elman.ops.log_space import join, number, to_log_space
from tests.mixers.test_elman import B, D, T, build, sigmoid, silu

Array = npt.NDArray[np.float64]
Candidate = Callable[[Array, Array], Array]
GROUPS = 4


def tanh(v: Array, alpha: Array) -> Array:
    return np.tanh(v)


def clamped_power(v: Array, alpha: Array) -> Array:
    c = np.clip(v, -1, 1)
    return np.sign(c) * np.e * (np.abs(c) / np.e) ** alpha


def bounded_power(v: Array, alpha: Array) -> Array:
    power = np.abs(v) ** alpha
    return np.sign(v) * power / (1 + power)


def step(p: dict[str, Array], weight: Array, x: Array, h: Array, candidate: Candidate) -> tuple[Array, Array]:
    """One of any rung; ``weight`` is (d, d), (d,) or a stack of two."""
    d = len(h)
    pre = p["input.weight"] @ (p["in_proj.weight"] @ x) + p["input.bias"]
    of_v, of_delta, *of_alpha = np.split(pre, len(pre) // d)
    if weight.ndim == 1:
        of_v = of_v + weight * h
    elif weight.ndim == 2:
        of_v = of_v + weight @ h
    else:
        of_v, of_delta = of_v + weight[0] @ h, of_delta + weight[1] @ h
    alpha = 1 + np.log1p(np.exp(of_alpha[0])) if of_alpha else np.ones(d)
    delta = sigmoid(of_delta)
    h = (1 - delta) * h + delta * candidate(of_v, alpha)
    y = h
    if "show_proj.weight" in p:
        e = np.exp(h.reshape(GROUPS, -1))
        y = (e / e.sum(1, keepdims=True)).reshape(-1) * silu(p["show_proj.weight"] @ h)
    return p["out_proj.weight"] @ y, h


RUNGS: list[tuple[str, Candidate, dict[str, Any]]] = [
    ("1", tanh, {}),
    ("2", tanh, {"groups": GROUPS}),
    ("3", tanh, {"groups": GROUPS}),
    ("4", tanh, {"groups": GROUPS, "constraint": "scaled_orthogonal"}),
    ("4", tanh, {"groups": GROUPS}),
    ("5", tanh, {"groups": GROUPS}),
]


@pytest.mark.parametrize(
    ("name", "candidate", "options"),
    [(f"{kind}_{n}", *rest) for kind in ("ladder", "log") for n, *rest in RUNGS]
    + [("ladder_6", clamped_power, {"groups": GROUPS}), ("log_0", bounded_power, {"groups": GROUPS})],
)
def test_equals_its_equation(name: str, candidate: Candidate, options: dict[str, Any]) -> None:
    mixer = build(name, expansion=1.5, **options)
    p = {key: value.detach().numpy() for key, value in mixer.named_parameters()}
    weight = mixer.weight_h().detach().numpy()
    x = torch.randn(T, B, D, dtype=torch.float64)
    h0 = torch.randn(B, round(1.5 * D), dtype=torch.float64).tanh()
    logarithmic = name.startswith("log")
    y, last = mixer(x, (h0, join(*to_log_space(h0))) if logarithmic else h0, None)
    h_last = number(last[1]) if logarithmic else last
    for row in range(B):
        h = h0[row].numpy()
        for t in range(T):
            expected, h = step(p, weight, x[t, row].numpy(), h, candidate)
            np.testing.assert_allclose(y[t, row].detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(h_last[row].detach().numpy(), h, rtol=1e-9, atol=1e-14)


def test_ladder_0_is_e0() -> None:
    torch.manual_seed(0)
    ours = mixer_config("ladder_0")().build(D)
    torch.manual_seed(0)
    stock = mixer_config("e0")().build(D)
    x = torch.randn(T, B, D)
    torch.testing.assert_close(ours(x, None, None), stock(x, None, None), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ladder_1", "ladder_6", "log_5"])
def test_a_unit_at_first_forgets_over_eight_steps(name: str) -> None:
    mixer = mixer_config(name)().build(D)
    mixer.initialize()
    rates = mixer.input.bias.view(-1, D)
    assert (rates[1] == -2).all()
    assert (rates[0] == 0).all()
    assert 1 / torch.sigmoid(rates[1, 0]).item() == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize(("size", "groups"), [(1280, 32), (96, 32), (40, 20), (16, 16), (37, 1)])
def test_groups_divide_the_units(size: int, groups: int) -> None:
    assert mixer_config("ladder_2")().groups_of(size) == groups


@pytest.mark.parametrize(
    ("name", "units"),
    [
        *((f"ladder_{n}", units) for n, units in enumerate((4, 5, 6, 5, 6, 7, 6))),
        *((f"log_{n}", units) for n, units in enumerate((6, 5, 6, 5, 6, 7))),
    ],
)
def test_weights_are_as_many_as_the_ladder_says(name: str, units: int) -> None:
    assert mixer_config(name)().num_params(1024) == pytest.approx(units * 1024**2, rel=0.005)


@pytest.mark.parametrize("name", ["ladder_6", "log_0", "ladder_5"])
def test_states_stay_within_one_whatever_the_weights(name: str) -> None:
    torch.manual_seed(0)
    mixer = mixer_config(name)().build(D)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=30)
    y, state = mixer(torch.randn(200, B, D), None, None)
    for h in (state[0], number(state[1])) if isinstance(state, tuple) else (state,):
        assert h.abs().max() <= 1
    assert y.isfinite().all()


def test_the_log_state_is_float32_under_autocast() -> None:
    mixer = mixer_config("log_1")().build(D)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(torch.randn(T, B, D), None, None)
    assert y.dtype == torch.bfloat16
    assert [x.dtype for x in state] == [torch.bfloat16, torch.float32]


def test_groups_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="--groups 0 is out of range"):
        mixer_config("ladder_2")(groups=0)


def test_bare_numbers_are_of_the_e_series_and_rungs_have_names() -> None:
    assert parse_pattern("0,1,10,15") == ("e0", "e1", "e10", "e15")
    assert parse_pattern("ladder_3,LOG_2") == ("ladder_3", "log_2")
    with pytest.raises(UsageError, match="'e6' is unknown"):
        parse_pattern("6")

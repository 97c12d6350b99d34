"""E0, E1, E4 and E5 against a twin: their equations in numpy, one step and one row at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from elman.errors import UsageError
from elman.mixers import Mixer, mixer_config

Array = npt.NDArray[np.float64]
T, B, D = 6, 2, 8


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def weight_h(p: dict[str, Array]) -> Array:
    if "recurrence.weight_h.u" in p:
        return p["recurrence.weight_h.u"] @ p["recurrence.weight_h.v"]
    return p["recurrence.weight_h.weight"]


def e0(p: dict[str, Array], x: Array, h: Array, gate: str) -> tuple[Array, Array]:
    u = p["in_proj.weight"] @ x
    h = np.tanh(weight_h(p) @ h + p["recurrence.input.weight"] @ u + p["recurrence.input.bias"])
    y = h if gate == "none" else h * silu(p["gate_proj.weight"] @ u + p["gate_proj.bias"])
    return p["out_proj.weight"] @ y, h


def bounded(by: float, p: dict[str, Array], x: Array, h: Array, gate: str) -> tuple[Array, Array]:
    """E1 with a state within these bounds, of which it keeps a part of one."""
    d = len(h)
    u = silu(p["in_proj.weight"][:d] @ x)
    sums = weight_h(p) @ (by * h) + p["recurrence.input.weight"] @ u + p["recurrence.input.bias"]
    h = by * np.tanh(sums / by)
    return p["out_proj.weight"] @ (h * silu(p["in_proj.weight"][d:] @ x)), h / by


def e1(p: dict[str, Array], x: Array, h: Array, gate: str) -> tuple[Array, Array]:
    d = len(h)
    u = silu(p["in_proj.weight"][:d] @ x)
    h = np.tanh(weight_h(p) @ h + p["recurrence.input.weight"] @ u + p["recurrence.input.bias"])
    if gate == "hx":
        shown = silu(p["gate_proj.weight"] @ np.concatenate([h, u]) + p["gate_proj.bias"])
    else:
        z = p["in_proj.weight"][d:] @ x
        shown = silu(z) if gate == "split" else sigmoid(z)
    return p["out_proj.weight"] @ (h * shown), h


def e5(p: dict[str, Array], x: Array, h: Array, gate: str) -> tuple[Array, Array]:
    pre = p["input.1.weight"] @ p["input.0.weight"] @ x + p["input.1.bias"]
    h = np.tanh(p["weight_h.u"] @ p["weight_h.v"] @ h + pre)
    return h if gate == "none" else h * silu(p["gate_proj.1.weight"] @ p["gate_proj.0.weight"] @ x), h


def build(name: str, **options: Any) -> Mixer:
    torch.manual_seed(0)
    mixer = mixer_config(name)(**options).build(D).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    return mixer


@pytest.mark.parametrize(
    ("name", "twin", "options"),
    [
        *(
            (name, twin, {"gate": gate, "expansion": expansion})
            for name, twin, gate in (
                ("e0", e0, "none"),
                ("e0", e0, "input"),
                ("e1", e1, "split"),
                ("e1", e1, "hx"),
                ("e1", e1, "sigmoid"),
            )
            for expansion in (1.0, 1.5)
        ),
        ("e1", partial(bounded, 4.0), {"gate": "split", "bound": 4.0}),
        ("e1", partial(bounded, 0.5), {"gate": "split", "bound": 0.5, "expansion": 1.5}),
        ("e4", e1, {"gate": "split", "rank": 3}),
        ("e4", e1, {"gate": "hx", "rank": 5, "expansion": 1.0}),
        ("e5", e5, {"gate": "input", "rank": 3}),
        ("e5", e5, {"gate": "none", "rank": 5}),
    ],
)
def test_equals_its_equation(name: str, twin: Callable[..., tuple[Array, Array]], options: dict[str, Any]) -> None:
    mixer, size = build(name, **options), mixer_config(name)(**options).state_size(D, T)
    parameters = {key: value.detach().numpy() for key, value in mixer.named_parameters()}
    x = torch.randn(T, B, D, dtype=torch.float64)
    h0 = torch.randn(B, size, dtype=torch.float64)
    y, h_last = mixer(x, h0, None)
    for row in range(B):
        h = h0[row].numpy()
        for t in range(T):
            expected, h = twin(parameters, x[t, row].numpy(), h, options["gate"])
            np.testing.assert_allclose(y[t, row].detach().numpy(), expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(h_last[row].detach().numpy(), h, rtol=1e-10)


@pytest.mark.parametrize(("expansion", "rank"), [(1.0, 3), (2.0, 5), (4.0, 2)])
@pytest.mark.parametrize("constraint", ["free", "spectral_norm"])
def test_gradients_of_e4_are_those_of_its_dense_twin(expansion: float, rank: int, constraint: str) -> None:
    """Value by value: with transposes gone wrong, the norms may still be right."""
    low_rank = build("e4", expansion=expansion, rank=rank, constraint=constraint)
    dense = build("e1", expansion=expansion)
    weight = low_rank.recurrence.weight_h
    for _ in range(200 if constraint == "spectral_norm" else 0):
        weight.after_step()
    given = dict(low_rank.named_parameters())
    u, v = (given.pop(name) for name in list(given) if "weight_h" in name)
    w = (u @ v).detach().requires_grad_()
    sigma = torch.linalg.matrix_norm(w, 2)
    assert sigma > 0.99
    scaled = w if constraint == "free" else w * 0.99 / sigma
    x = torch.randn(T, B, D, dtype=torch.float64)
    dy = torch.randn(T, B, D, dtype=torch.float64)
    found, _ = low_rank(x, None, None)
    with torch.no_grad():
        dense.recurrence.weight_h.weight.copy_(scaled)
    dense.load_state_dict({name: value.detach() for name, value in given.items()}, strict=False)
    expected, _ = dense(x, None, None)
    torch.testing.assert_close(found, expected)
    found.backward(dy)
    expected.backward(dy)
    twins = dict(dense.named_parameters())
    (dw,) = torch.autograd.grad(scaled, w, twins.pop("recurrence.weight_h.weight").grad)
    torch.testing.assert_close(u.grad, dw @ v.T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(v.grad, u.T @ dw, rtol=1e-9, atol=1e-11)
    assert twins.keys() == given.keys() >= {"recurrence.input.weight", "in_proj.weight"}
    for name, parameter in given.items():
        torch.testing.assert_close(parameter.grad, twins[name].grad, msg=name)


@pytest.mark.parametrize(("name", "options"), [("e0", {"gate": "input"}), ("e1", {}), ("e1", {"gate": "hx"})])
def test_weights_start_as_documented(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mixer = mixer_config(name)(**options).build(256)
    mixer.initialize()
    for key, parameter in mixer.named_parameters():
        if key == "recurrence.weight_h.weight":
            torch.testing.assert_close(parameter @ parameter.T, 0.999**2 * torch.eye(256), atol=1e-5, rtol=0)
        elif parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
        else:
            assert (parameter == 0).all()


@pytest.mark.parametrize(("name", "gate"), [("e0", "split"), ("e1", "none"), ("e1", "bogus")])
def test_an_unknown_gate_is_refused_in_python_too(name: str, gate: str) -> None:
    with pytest.raises(UsageError, match=f"--gate {gate!r} is unknown: choose one of"):
        mixer_config(name)(gate=gate)

"""E0 and E1 against a twin: their equations in numpy, one step and one row at a time."""

from collections.abc import Callable
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


def e0(p: dict[str, Array], x: Array, h: Array, gate: str) -> tuple[Array, Array]:
    u = p["in_proj.weight"] @ x
    h = np.tanh(p["recurrence.weight_h"] @ h + p["recurrence.input.weight"] @ u + p["recurrence.input.bias"])
    y = h if gate == "none" else h * silu(p["gate_proj.weight"] @ u + p["gate_proj.bias"])
    return p["out_proj.weight"] @ y, h


def e1(p: dict[str, Array], x: Array, h: Array, gate: str) -> tuple[Array, Array]:
    d = len(h)
    u = silu(p["in_proj.weight"][:d] @ x)
    h = np.tanh(p["recurrence.weight_h"] @ h + p["recurrence.input.weight"] @ u + p["recurrence.input.bias"])
    if gate == "hx":
        shown = silu(p["gate_proj.weight"] @ np.concatenate([h, u]) + p["gate_proj.bias"])
    else:
        z = p["in_proj.weight"][d:] @ x
        shown = silu(z) if gate == "split" else sigmoid(z)
    return p["out_proj.weight"] @ (h * shown), h


def build(name: str, **options: Any) -> Mixer:
    torch.manual_seed(0)
    mixer = mixer_config(name)(**options).build(D).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    return mixer


@pytest.mark.parametrize("expansion", [1.0, 1.5])
@pytest.mark.parametrize(
    ("name", "twin", "gate"),
    [("e0", e0, "none"), ("e0", e0, "input"), ("e1", e1, "split"), ("e1", e1, "hx"), ("e1", e1, "sigmoid")],
)
def test_equals_its_equation(name: str, twin: Callable[..., tuple[Array, Array]], gate: str, expansion: float) -> None:
    mixer = build(name, gate=gate, expansion=expansion)
    parameters = {key: value.detach().numpy() for key, value in mixer.named_parameters()}
    x = torch.randn(T, B, D, dtype=torch.float64)
    h0 = torch.randn(B, round(expansion * D), dtype=torch.float64)
    y, h_last = mixer(x, h0, None)
    for row in range(B):
        h = h0[row].numpy()
        for t in range(T):
            expected, h = twin(parameters, x[t, row].numpy(), h, gate)
            np.testing.assert_allclose(y[t, row].detach().numpy(), expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(h_last[row].detach().numpy(), h, rtol=1e-10)


@pytest.mark.parametrize(("name", "options"), [("e0", {"gate": "input"}), ("e1", {}), ("e1", {"gate": "hx"})])
def test_weights_start_as_documented(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mixer = mixer_config(name)(**options).build(256)
    mixer.initialize()
    for key, parameter in mixer.named_parameters():
        if key == "recurrence.weight_h":
            torch.testing.assert_close(parameter @ parameter.T, 0.999**2 * torch.eye(256), atol=1e-5, rtol=0)
        elif parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
        else:
            assert (parameter == 0).all()


@pytest.mark.parametrize(("name", "gate"), [("e0", "split"), ("e1", "none"), ("e1", "bogus")])
def test_an_unknown_gate_is_refused_in_python_too(name: str, gate: str) -> None:
    with pytest.raises(UsageError, match=f"--gate {gate!r} is unknown: choose one of"):
        mixer_config(name)(gate=gate)

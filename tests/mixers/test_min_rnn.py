"""minGRU and minLSTM against a twin: the paper's equations in numpy, one step and one row at a time."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from elman.mixers import Mixer, mixer_config

Array = npt.NDArray[np.float64]
T, B, D = 9, 2, 6
names = pytest.mark.parametrize("name", ["mingru", "minlstm"])


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def step(name: str, p: dict[str, Array], x: Array, h: Array) -> Array:
    projected = p["in_proj.weight"] @ x + p["in_proj.bias"]
    *gates, v = np.split(projected, 2 if name == "mingru" else 3)
    candidate = np.where(v >= 0, v + 0.5, sigmoid(v))
    if name == "mingru":
        z = sigmoid(gates[0])
        return (1 - z) * h + z * candidate
    f, i = sigmoid(gates[0]), sigmoid(gates[1])
    return f / (f + i) * h + i / (f + i) * candidate


def build(name: str) -> Mixer:
    torch.manual_seed(0)
    mixer = mixer_config(name)(expansion=1.5).build(D).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    return mixer


@names
def test_the_parallel_form_is_the_recurrence(name: str) -> None:
    mixer = build(name)
    p = {key: value.detach().numpy() for key, value in mixer.named_parameters()}
    x, warm = torch.randn(T, B, D, dtype=torch.float64), torch.rand(B, 9, dtype=torch.float64)
    with torch.no_grad():
        y, last = mixer(x, warm, None)
    h = warm.numpy().copy()
    for t in range(T):
        for row in range(B):
            h[row] = step(name, p, x[t, row].numpy(), h[row])
            np.testing.assert_allclose(y[t, row], p["out_proj.weight"] @ h[row], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(last, h, rtol=1e-9)


@names
def test_saturated_gates_give_finite_values_and_gradients(name: str) -> None:
    mixer = build(name).float()
    x = (1e4 * torch.randn(T, B, D)).requires_grad_()
    y, _ = mixer(x, None, None)
    y.square().mean().backward()
    for tensor in (y, x.grad, *(parameter.grad for parameter in mixer.parameters())):
        assert tensor is not None
        assert tensor.isfinite().all()

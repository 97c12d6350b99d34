"""LSTM, GRU and tanh network: PyTorch's kernels and ours give the same, from the same parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from elman.mixers import Mixer, mixer_config
from elman.ops import record_backends

T, B, D = 7, 3, 8
names = pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])


def build(name: str, **options: Any) -> Mixer:
    torch.manual_seed(0)
    mixer = mixer_config(name)(expansion=1.5, **options).build(D).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    return mixer


def outcome(mixer: Mixer, x: Tensor, state: Any) -> list[Tensor]:
    """Output, last state and the gradients of a function of both."""
    x = x.clone().requires_grad_()
    y, last = mixer(x, state, None)
    leaves = tree_leaves(last)
    loss = y.square().sum() + sum(leaf.sin().sum() for leaf in leaves)
    gradients = torch.autograd.grad(loss, [x, *mixer.parameters()])
    return [tensor.detach() for tensor in (y, *leaves, *gradients)]


@names
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_both_kernels_give_the_same_values_and_gradients(name: str, device: str) -> None:
    theirs, ours = build(name).to(device), build(name, kernels="elman").to(device)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    x = torch.randn(T, B, D, dtype=torch.float64, device=device)
    _, warm = theirs(torch.randn_like(x), None, None)
    warm = tree_map(torch.Tensor.detach, warm)
    for state in (None, warm):
        torch.testing.assert_close(outcome(ours, x, state), outcome(theirs, x, state))


@names
def test_who_runs(name: str) -> None:
    x, reset = torch.randn(T, B, D, dtype=torch.float64), torch.zeros(T, B, dtype=torch.bool)
    for options, given, expected in (
        ({}, None, "torch"),
        ({}, reset, "reference"),
        ({"kernels": "elman"}, None, "reference"),
    ):
        with record_backends() as used:
            build(name, **options)(x, None, given)
        assert used == [expected]

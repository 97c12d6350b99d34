"""The Transformer layer against a twin: rotations as complex numbers, one query at a time, in numpy."""

import numpy as np
import torch

from elman.mixers import mixer_config

T, B, D = 6, 2, 16


def test_attention_equals_its_equation_within_documents() -> None:
    torch.manual_seed(0)
    attention, _ = mixer_config("transformer")(head_dim=8).build(D)
    attention = attention.double()
    x = torch.randn(T, B, D, dtype=torch.float64)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4, 0] = True
    with torch.no_grad():
        y, _ = attention(x, None, reset)
    qkv, out = (layer.weight.detach().numpy() for layer in (attention.qkv_proj, attention.out_proj))
    speeds = 10_000.0 ** (-np.arange(4) / 4)
    for row in range(B):
        q, k, v = np.moveaxis((x[:, row].numpy() @ qkv.T).reshape(T, 3, 2, 8), 1, 0)
        q, k = (part[..., :4] + 1j * part[..., 4:] for part in (q, k))
        for t in range(T):
            first = 4 if row == 0 and t >= 4 else 0
            heads = []
            for head in range(2):
                # A rotation by the distance alone: where the document lies does not matter.
                turns = np.exp(1j * (t - np.arange(first, t + 1))[:, None] * speeds)
                scores = (q[t, head] * turns * k[first : t + 1, head].conj()).real.sum(1) / np.sqrt(8)
                weights = np.exp(scores - scores.max())
                heads.append(weights / weights.sum() @ v[first : t + 1, head])
            np.testing.assert_allclose(y[t, row], out @ np.concatenate(heads), rtol=1e-9, atol=1e-12)


def test_swiglu_equals_its_equation() -> None:
    _, mlp = mixer_config("transformer")().build(D)
    mlp = mlp.double()
    x = torch.randn(T, B, D, dtype=torch.float64)
    gate, up, down = (layer.weight.detach().numpy() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    g = x.numpy() @ gate.T
    expected = (g / (1 + np.exp(-g)) * (x.numpy() @ up.T)) @ down.T
    np.testing.assert_allclose(mlp(x, None, None)[0].detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_shape_of_the_benchmarks() -> None:
    config = mixer_config("transformer")()
    assert config.heads(640) == (10, 64)
    assert config.mlp_size(640) == 1704

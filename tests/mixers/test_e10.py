"""E10 and E15 against twins: their equations in numpy, one step and one row at a time."""

import numpy as np
import pytest
import torch

from elman.errors import UsageError
from elman.mixers import mixer_config
from tests.mixers.test_elman import B, D, T, build, silu


@pytest.mark.parametrize("banks", [1, 3])
def test_e10_equals_its_equation(banks: int) -> None:
    mixer = build("e10", banks=banks, expansion=1.5)
    p = {key: value.detach().numpy() for key, value in mixer.named_parameters()}
    d = round(1.5 * D)
    x = torch.randn(T, B, D, dtype=torch.float64)
    h0, m0 = torch.randn(B, d, dtype=torch.float64), torch.randn(B, banks, d, dtype=torch.float64)
    y, (h_last, m_last) = mixer(x, (h0, m0), None)
    a = 1 / (1 + np.exp(-p["decay_logits"].reshape(banks, d)))
    for row in range(B):
        h, m = h0[row].numpy(), m0[row].numpy()
        for t in range(T):
            u, *z = np.split(p["in_proj.weight"] @ x[t, row].numpy(), banks + 2)
            into = p["recurrence.input.weight"] @ silu(u) + p["recurrence.input.bias"]
            h = np.tanh(p["recurrence.weight_h.weight"] @ h + into)
            m = a * m + (1 - a) * h
            shown = h * silu(z[0]) + sum(m[i] * silu(z[i + 1]) for i in range(banks))
            np.testing.assert_allclose(y[t, row].detach().numpy(), p["out_proj.weight"] @ shown, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(h_last[row].detach().numpy(), h, rtol=1e-10)
        np.testing.assert_allclose(m_last[row].detach().numpy(), m, rtol=1e-10)


def test_e10_starts_with_decays_from_0_8_to_0_99() -> None:
    mixer = mixer_config("e10")().build(D)
    mixer.initialize()
    decays = mixer.decay_logits.sigmoid().view(4, D)
    torch.testing.assert_close(decays, torch.linspace(0.8, 0.99, 4).unsqueeze(1).expand(4, D))
    assert mixer.decay_logits.ndim == 1  # which is what the optimiser does not decay


def test_e15_is_e1_with_the_softsign() -> None:
    mixer = build("e15", gate="hx")
    p = {key: value.detach().numpy() for key, value in mixer.named_parameters()}
    x, h = torch.randn(1, 1, D, dtype=torch.float64), torch.randn(1, D, dtype=torch.float64)
    y, _ = mixer(x, h, None)
    u = silu(p["in_proj.weight"] @ x[0, 0].numpy())
    into = p["recurrence.input.weight"] @ u + p["recurrence.input.bias"]
    v = p["recurrence.weight_h.weight"] @ h[0].numpy() + into
    v = v / (1 + abs(v))
    shown = v * silu(p["gate_proj.weight"] @ np.concatenate([v, u]) + p["gate_proj.bias"])
    np.testing.assert_allclose(y[0, 0].detach().numpy(), p["out_proj.weight"] @ shown, rtol=1e-10)


@pytest.mark.parametrize("banks", [0, 17])
def test_a_number_of_banks_out_of_range_is_refused(banks: int) -> None:
    with pytest.raises(UsageError, match=f"--banks {banks} is out of range"):
        mixer_config("e10")(banks=banks)

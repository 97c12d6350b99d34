"""What the matrix mixer adds to its recurrence, which tests/ops/test_matrix.py tries."""

import re

import pytest
import torch

from elman.errors import UsageError
from elman.mixers import matrix, mixer_config
from elman.mixers.matrix import Matrix


def build(**options: object) -> Matrix:
    torch.manual_seed(0)
    mixer = mixer_config("matrix")(key_size=4, value_size=4, **options).build(8)
    assert isinstance(mixer, Matrix)
    return mixer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta_max": 0.0}, "--beta-max 0.0 is out of range: give a number above 0 and up to 2"),
        ({"beta_max": 2.1}, "--beta-max 2.1 is out of range"),
        ({"beta_max": float("nan")}, "--beta-max nan is out of range"),
        ({"beta": "none", "beta_max": 2.0}, "--beta-max 2.0 is of no use to --beta none"),
        ({"bound": 0.0}, "--bound 0.0 is out of range: give a number above 0 and up to 1000"),
        ({"bound": float("inf")}, "--bound inf is out of range"),
        ({"conv": 1}, "--conv 1 is out of range"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        build(**options)


def test_beta_max_lets_a_step_turn_round_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """S' k = (1 - β) S' k where nothing decays and v is 0: below 0 only for a β above 1."""
    seen: list[torch.Tensor] = []
    recurrence = matrix.matrix_recurrence

    def watched(q, k, v, decay, beta, *rest, **named):  # type: ignore[no-untyped-def]
        seen.append(beta)
        return recurrence(q, k, v, decay, beta, *rest, **named)

    monkeypatch.setattr(matrix, "matrix_recurrence", watched)
    x = torch.randn(3, 2, 8)
    plain, wide = build(), build(beta_max=2.0)
    wide.load_state_dict(plain.state_dict())
    for mixer in (plain, wide):
        mixer.beta_bias.data.fill_(20.0)
        mixer(x, None, None)
    torch.testing.assert_close(seen[1], 2 * seen[0])
    assert float(seen[0].detach().max()) <= 1 < float(seen[1].detach().min())


def test_a_bound_is_a_scale_of_what_the_first_product_makes_of_v() -> None:
    plain, scaled = build().double(), build(bound=4.0).double()
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    scaled.load_state_dict(plain.state_dict())
    one, _ = scaled(x, None, None)
    other, _ = plain(x, None, None)
    assert not torch.allclose(one, other)
    keys, values = plain.sizes["q"] + plain.sizes["k"], plain.sizes["v"]
    plain.in_proj.weight.data[keys : keys + values] *= 0.25
    torch.testing.assert_close(one, plain(x, None, None)[0])


def test_products_apart_and_in_one_are_the_same() -> None:
    """With gradients q, k and v are made by a product each, without by one."""
    for options in ({}, {"conv": 3}):
        mixer, x = build(**options).double(), torch.randn(5, 2, 8, dtype=torch.float64)
        apart, _ = mixer(x, None, None)
        with torch.no_grad():
            in_one, _ = mixer(x, None, None)
        assert apart.requires_grad
        torch.testing.assert_close(apart.detach(), in_one)

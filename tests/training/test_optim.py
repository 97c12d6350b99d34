import itertools

import pytest

from elman.mixers import mixer_config
from elman.model import LanguageModel, ModelConfig
from elman.training.config import TrainConfig
from elman.training.optim import build_optimizer, learning_rate


def test_warm_up_then_cosine_to_zero() -> None:
    config = TrainConfig(steps=100, lr=1.0, warmup=9)
    rates = [learning_rate(config, step, step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[50] == pytest.approx(0.5)
    assert rates[-1] < 0.001


def test_constant_stays() -> None:
    config = TrainConfig(steps=100, lr=1.0, warmup=0, schedule="constant")
    assert {learning_rate(config, step, step / 100) for step in range(100)} == {1.0}


def test_matrices_decay_and_vectors_do_not() -> None:
    model = LanguageModel(ModelConfig(16, 2, (mixer_config("e1")(gate="hx"),)))
    optimizer = build_optimizer(model, TrainConfig(steps=1))
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    decayed, plain = build_optimizer(model, TrainConfig(steps=1, weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))

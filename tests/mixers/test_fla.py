"""Layers of flash-linear-attention by name, with a stand-in for the package: its interface in plain PyTorch."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elman.cli import _run_command
from elman.errors import UsageError
from elman.mixers import mixer_config, parse_pattern
from elman.model import LanguageModel, ModelConfig
from elman.sizing import num_params, size_model, state_size
from elman.training.config import TrainConfig


class Cache:
    """As ``fla.models.utils.Cache``: one dictionary of states a layer."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    @classmethod
    def from_legacy_cache(cls, states: tuple[dict[str, Any], ...], seen_tokens: int) -> "Cache":
        cache = cls()
        cache.states = [dict(state) for state in states]
        return cache

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.states[index]

    def __len__(self) -> int:
        return len(self.states)


class DecayAttention(nn.Module):
    """Linear attention of one decay, which overwrites the state that it is given, as some kernels do."""

    def __init__(self, hidden_size: int = 64, num_heads: int = 2, layer_idx: int | None = None) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"{hidden_size} is no multiple of {num_heads}")
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, past_key_values: Cache, use_cache: bool) -> tuple[Tensor, None, Cache]:
        batch, steps, _ = hidden_states.shape
        q, k, v = self.qkv(hidden_states).view(batch, steps, 3, self.num_heads, self.head_dim).unbind(2)
        if len(past_key_values):
            given = past_key_values[0]["recurrent_state"]
            state = given.clone()
            given.data.fill_(float("nan"))
        else:
            state = hidden_states.new_zeros(batch, self.num_heads, self.head_dim, self.head_dim)
        outputs = []
        for t in range(steps):
            state = 0.9 * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            outputs.append((q[:, t].unsqueeze(-2) @ state).flatten(1))
        past_key_values.states = [{"recurrent_state": state, "attn_state": None}]
        return self.out(torch.stack(outputs, 1)), None, past_key_values


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, utils = types.ModuleType("fla.layers"), types.ModuleType("fla.models.utils")
    layers.__all__, layers.DecayAttention = ["DecayAttention"], DecayAttention  # type: ignore[attr-defined]
    utils.Cache = Cache  # type: ignore[attr-defined]
    for module in (types.ModuleType("fla"), layers, types.ModuleType("fla.models"), utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_names_and_patterns() -> None:
    assert parse_pattern("e1, fla:decay") == parse_pattern("E1,fla:DecayAttention") == ("e1", "fla:DecayAttention")
    with pytest.raises(UsageError, match=r"has no such layer; it has DecayAttention"):
        mixer_config("fla:GLA")


def test_a_missing_package_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.layers", None)
    with pytest.raises(UsageError, match="pip install flash-linear-attention"):
        mixer_config("fla:GLA")


def test_counts_come_from_the_layer() -> None:
    config = ModelConfig(16, 2, (mixer_config("fla:Decay")(options='{"num_heads": 4}'),))
    model = LanguageModel(config)
    assert num_params(config) == sum(parameter.numel() for parameter in model.parameters())
    assert config.mixers[0].flops_per_token(16, 1) == 2 * 4 * 16 * 16
    assert state_size(config, 7) == 2 * 4 * 4 * 4
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert abs(num_params(size_model(config.mixers, params=3_000_000)) / 3e6 - 1) <= 0.02


def test_chunks_equal_one_piece_and_resets_equal_separate_sequences() -> None:
    model = LanguageModel(ModelConfig(16, 2, (mixer_config("fla:Decay")(),))).double()
    text = torch.randint(256, (3, 9))
    whole, last = model(text)
    first, state = model(text[:, :4])
    again, _ = model(text[:, :4])
    rest, end = model(text[:, 4:], state)
    assert all(layer["recurrent_state"].isfinite().all() for layer in state)
    torch.testing.assert_close(torch.cat((again, rest), 1), whole)
    torch.testing.assert_close(end, last)
    reset = torch.zeros(3, 9, dtype=torch.bool)
    reset[1, 4] = True
    found, _ = model(text, None, reset)
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]])
    torch.testing.assert_close(found[1, :4], first[1])
    torch.testing.assert_close(found[1:2, 4:], model(text[1:2, 4:])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{", "is no JSON object"),
        ("[]", "is no JSON object"),
        ('{"hidden_size": 8}', "the width comes from --dim"),
        ('{"heads": 8}', "takes no heads: it takes num_heads"),
    ],
)
def test_bad_options_are_named(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixer_config("fla:Decay")(options=options)


def test_what_cannot_be_made_or_run_is_named() -> None:
    config = mixer_config("fla:Decay")(options='{"num_heads": 3}')
    with pytest.raises(UsageError, match=r"cannot be made at width 16 \(16 is no multiple of 3\)"):
        config.build(16)
    with pytest.raises(UsageError, match="runs on a GPU only"):
        config.check_device(torch.device("cpu"))


def test_options_reach_the_command_line() -> None:
    import tyro

    argv = ["--model", "e1,fla:decay", "--steps", "1", "--fla:DecayAttention.options", '{"num_heads": 4}']
    parsed = tyro.cli(_run_command(TrainConfig, argv), args=argv)
    assert parsed.fla_DecayAttention.options == '{"num_heads": 4}'

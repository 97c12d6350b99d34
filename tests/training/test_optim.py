import copy
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterable, Iterator

import pytest
import torch

from elman.errors import UsageError
from elman.mixers import MixerConfig, mixer_config
from elman.model import LanguageModel, ModelConfig
from elman.training.config import TrainConfig
from elman.training.optim import Optimizer, build_optimizer, learning_rate, parameter_roles, rate_multiples
from tests.test_model import VARIANTS

needs_schedulefree = pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="no schedulefree")
OPTIMIZERS = ("adamw", pytest.param("schedulefree", marks=needs_schedulefree), "muon")
#: Names of what must not decay, whatever its shape; a vector never does.
PLAIN = re.compile(r"(.*\.)?(bias(_ih_l0|_hh_l0)?|norm\.weight|dt_bias|A_log|D|decay_logits|(decay|beta)_bias|s)")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def build(name: str, mixer: MixerConfig | None = None, **options: object) -> tuple[LanguageModel, Optimizer]:
    torch.manual_seed(0)
    mixer = mixer or mixer_config("e1")(gate="hx")
    model = LanguageModel(ModelConfig(16, 2, (mixer,)))
    config = TrainConfig(**{"optimizer": name, "steps": 20, "warmup": 3, "lr": 0.01, **options})  # type: ignore[arg-type]
    return model, build_optimizer(model, config)


def put_gradients(model: LanguageModel, seed: int, value: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = value * torch.randn(parameter.shape, generator=generator)


def tensors(model: LanguageModel, optimizer: Optimizer) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    for part in optimizer.parts:
        for parameter in model.parameters():
            yield from part.state.get(parameter, {}).values()


def same(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_warm_up_then_cosine_to_zero() -> None:
    config = TrainConfig(steps=100, lr=1.0, warmup=9)
    rates = [learning_rate(config, step, step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[50] == pytest.approx(0.5)
    assert rates[-1] < 0.001


def test_a_warm_up_may_be_a_part_of_the_run() -> None:
    config = TrainConfig(time_limit="10s", lr=1.0, warmup=0.2, schedule="constant")
    # Ten steps a second or a hundred: the rate at a time is the same.
    for steps in (100, 1000):
        rates = [learning_rate(config, step, step / steps) for step in range(steps)]
        assert rates[0] == pytest.approx(0.01)
        assert rates[steps // 10] == pytest.approx(0.5)
        assert rates[steps // 5 - 1] < 1 == rates[steps // 5] == rates[-1]


def test_constant_stays_and_is_what_schedulefree_means() -> None:
    for config in (
        TrainConfig(steps=100, lr=1.0, warmup=0, schedule="constant"),
        TrainConfig(steps=100, lr=1.0, warmup=0, schedule="cosine", optimizer="schedulefree"),
    ):
        assert config.schedule == "constant"
        assert {learning_rate(config, step, step / 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize("mixer", [*VARIANTS, mixer_config("ladder_5")(structure="diagonal")], ids=str)
def test_biases_norms_and_decays_do_not_decay_and_the_rest_does(mixer: MixerConfig) -> None:
    model = LanguageModel(ModelConfig(16, 2, (mixer,)))
    diagonal = re.compile(r".*weight_h\.(unscaled\.)?weight" if getattr(mixer, "structure", "") == "diagonal" else "$.")
    roles, parameters = parameter_roles(model), dict(model.named_parameters())
    assert roles.keys() == parameters.keys()
    for name, role in roles.items():
        known = bool(PLAIN.fullmatch(name) or diagonal.fullmatch(name))
        # A new variant may have vectors of any name.
        assert (role == "plain") == (known or parameters[name].ndim < 2), f"{name} is {role}, unlike what PLAIN says"


def test_a_matrix_is_a_map_between_units() -> None:
    mixer = mixer_config("e1")(conv=4, structure="sparse_low_rank", gate="hx")
    roles = parameter_roles(LanguageModel(ModelConfig(16, 1, (mixer,))))
    assert {name.removeprefix("layers.0.mixer.") for name, role in roles.items() if role == "matrix"} == {
        *("in_proj.weight", "recurrence.input.weight", "gate_proj.weight", "out_proj.weight"),
        *("recurrence.weight_h.u", "recurrence.weight_h.v"),
    }
    assert {name.removeprefix("layers.0.mixer.") for name, role in roles.items() if role == "weight"} == {
        *("embedding.weight", "conv.weight", "recurrence.weight_h.entries"),
    }


def test_other_packages_marks_are_read() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    assert parameter_roles(layer) == {"weight": "matrix"}
    layer.weight._no_weight_decay = True  # as mamba-ssm and flash-linear-attention do
    assert parameter_roles(layer) == {"weight": "plain"}


@every_optimizer
def test_every_parameter_is_in_one_group_with_its_decay(name: str) -> None:
    model, optimizer = build(name, weight_decay=0.3)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decays)
    roles = parameter_roles(model)
    assert {n: decays[id(p)] for n, p in model.named_parameters()} == {
        n: 0.0 if role == "plain" else 0.3 for n, role in roles.items()
    }
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups if "betas" in group)


def test_muon_moves_a_matrix_about_as_far_as_adamw_does() -> None:
    model, optimizer = build("muon", weight_decay=0.0)
    weight = model.layers[0].mixer.in_proj.weight
    before = weight.detach().clone()
    put_gradients(model, 1)
    optimizer.step(torch.tensor(False))
    assert 0.1 < (weight - before).square().mean().sqrt() / 0.01 < 0.4  # AdamW's updates have an RMS of about 0.2


@every_optimizer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_skipped_step_changes_no_bit(name: str, bad: float) -> None:
    """Be it the first or a later one: the weights stay, and what comes after is as if it had not been."""
    (model, optimizer), (other, reference) = build(name), build(name)
    for step in range(4):
        if step != 1:
            made = [tensor for tensor in tensors(model, optimizer) if tensor.any()]
            before = copy.deepcopy(made)
            put_gradients(model, step, bad)
            optimizer.step(torch.tensor(True))
            assert same(made, before)
        for m, o in ((model, optimizer), (other, reference)):
            put_gradients(m, step)
            o.step(torch.tensor(False))
        if name == "schedulefree":
            # The weights of its average count steps; of the moments, only the squares know no average.
            squares = [[s["exp_avg_sq"] for s in o.parts[0].state.values()] for o in (optimizer, reference)]
            assert same(*squares)
        else:
            assert same(tensors(model, optimizer), tensors(other, reference))


@every_optimizer
def test_what_is_saved_goes_on_to_the_bit(name: str) -> None:
    model, optimizer = build(name)
    for step in range(3):
        put_gradients(model, step)
        optimizer.step(torch.tensor(False))
    state = copy.deepcopy(optimizer.state_dict())
    with optimizer.averaged():
        weights = copy.deepcopy(model.state_dict())
    other, resumed = build(name)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for step in range(3, 6):
        for m, o in ((model, optimizer), (other, resumed)):
            o.set_rate(0.01 / (1 + step))
            put_gradients(m, step)
            o.step(torch.tensor(False))
        assert same(tensors(model, optimizer), tensors(other, resumed))


def test_a_rate_on_the_device_is_the_rate_and_is_saved_as_a_number() -> None:
    """As a captured step has it; what it saves goes on with a rate of the host's, and the other way round."""
    (model, optimizer), (other, reference) = build("adamw", graph="on"), build("adamw")
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
    for step in range(8):
        for m, o in ((model, optimizer), (other, reference)):
            o.set_rate(0.1 / (3 + step))
            put_gradients(m, step)
            o.step(torch.tensor(False))
        assert same(tensors(model, optimizer), tensors(other, reference))
        if step == 4:
            states = copy.deepcopy((optimizer.state_dict(), reference.state_dict()))
            assert [group["lr"] for state in states for group in state["parts"][0]["param_groups"]] == [0.1 / 7] * 4
            reference.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
            assert len({id(group["lr"]) for group in optimizer.param_groups}) == 1


@needs_schedulefree
def test_schedulefree_evaluates_the_average_and_comes_back_to_the_bit() -> None:
    model, optimizer = build("schedulefree", weight_decay=0.0, warmup=0)
    weight = model.layers[0].mixer.in_proj.weight
    points = []
    for step in range(5):
        put_gradients(model, step)
        optimizer.step(torch.tensor(False))
        points.append(optimizer.parts[0].state[weight]["z"].clone())
    before = weight.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(weight.detach(), torch.stack(points).mean(0))
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)
    put_gradients(model, 5)
    optimizer.step(torch.tensor(False))


def test_the_others_evaluate_what_they_train() -> None:
    for name in ("adamw", "muon"):
        model, optimizer = build(name)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with optimizer.averaged():
            assert same(model.parameters(), before)


@needs_schedulefree
def test_schedulefree_warms_up_as_the_others_do() -> None:
    config = TrainConfig(steps=20, warmup=3, lr=0.01, optimizer="schedulefree")
    model, optimizer = build("schedulefree")
    for step in range(8):
        rate = learning_rate(config, step, step / 20)
        optimizer.set_rate(rate)
        put_gradients(model, step)
        optimizer.step(torch.tensor(False))
        assert all(group["scheduled_lr"] == pytest.approx(rate) for group in optimizer.param_groups)


def test_schedulefree_without_its_package_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(UsageError, match=r"--optimizer schedulefree needs its package .*: pip install schedulefree"):
        build("schedulefree")


@every_optimizer
@pytest.mark.parametrize("graph", ["auto", "on"])
def test_recurrent_matrices_take_a_multiple_of_the_rate(name: str, graph: str) -> None:
    """They alone: all others move as without it. With a rate that a graph may hold likewise."""
    e1 = mixer_config("e1")
    slow = e1(gate="hx", recurrent_lr=0.25)  # type: ignore[call-arg]
    model, optimizer = build(name, slow, weight_decay=0.0, graph=graph)
    plain, usual = build(name, weight_decay=0.0, graph=graph)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    multiples = rate_multiples(model)
    assert multiples == {key: 0.25 if "weight_h" in key else 1.0 for key in before}
    for one, steps in ((model, optimizer), (plain, usual)):
        put_gradients(one, seed=1)
        steps.set_rate(0.01)
        steps.step(torch.tensor(False))
    others = dict(plain.named_parameters())
    for key, value in model.named_parameters():
        moved, usually = value.detach() - before[key], others[key].detach() - before[key]
        torch.testing.assert_close(moved, multiples[key] * usually, rtol=1e-3, atol=1e-6)
    # What it saves is loaded by one without a graph, and back.
    again, other = build(name, slow, weight_decay=0.0)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    rates = [group["lr"] for group in other.param_groups]
    assert rates == [pytest.approx(0.01 * group["multiple"]) for group in other.param_groups]


@pytest.mark.parametrize(
    ("variant", "options", "names"),
    [
        *((name, {}, {"rnn.weight_hh_l0"}) for name in ("rnn", "gru", "lstm")),
        ("e4", {"rank": 4, "constraint": "spectral_norm"}, {f"recurrence.weight_h.unscaled.{x}" for x in "uv"}),
        ("e5", {"rank": 4}, {"weight_h.u", "weight_h.v"}),
        ("ladder_4", {}, {"weight_h.unscaled.weight"}),
    ],
)
def test_what_makes_up_a_recurrent_matrix(variant: str, options: dict[str, object], names: set[str]) -> None:
    model, _ = build("adamw", mixer_config(variant)(recurrent_lr=0.1, **options))
    slow = {name for name, multiple in rate_multiples(model).items() if multiple == 0.1}
    assert slow == {f"layers.{n}.mixer.{name}" for n in range(2) for name in names}


def test_rates_out_of_range_are_refused() -> None:
    for variant in ("e1", "gru"):
        with pytest.raises(UsageError, match=r"--recurrent-lr nan is out of range: give a number from 0 to 100"):
            mixer_config(variant)(recurrent_lr=float("nan"))  # type: ignore[call-arg]

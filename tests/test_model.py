"""Every registered variant, by being registered: the shell, its state, its counts, its gradients."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from elman import mixers
from elman.contract import BATCH, CHECKS, STEPS, Check, build, tokens
from elman.errors import UsageError
from elman.mixers import MixerConfig, mixer_config, mixer_names
from elman.model import LanguageModel, ModelConfig, next_token_loss
from elman.sizing import num_params
from elman.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

#: Options beside the defaults that change what a variant computes; every variant needs no more than its name here.
OPTIONS = {
    "e0": [
        {"gate": "input"},
        {"expansion": 1.5},
        {"structure": "diagonal"},
        {"structure": "monarch", "constraint": "spectral_norm"},
        {"conv": 4},
    ],
    "e1": [
        {"gate": "hx"},
        {"gate": "sigmoid"},
        {"expansion": 0.5, "gate": "hx"},
        {"structure": "block_diagonal", "heads": 4},
        {"structure": "sparse_low_rank", "rank": 3, "density": 0.3},
        {"structure": "random_projection", "rank": 8},
        {"constraint": "scaled_orthogonal"},
        {"conv": 4},
    ],
    "e4": [{"rank": 5, "expansion": 1.0}, {"constraint": "spectral_norm", "spectral_mode": "rescale"}],
    "e5": [{"gate": "none"}, {"rank": 7, "constraint": "spectral_norm"}],
    "e10": [{"banks": 2, "expansion": 1.5, "conv": 3}, {"structure": "diagonal"}],
    "e15": [{"gate": "hx", "conv": 2}],
    "matrix": [
        {"heads": 3, "key_size": 4, "value_size": 6, "conv": 3, "cell": "softsign"},
        {"key_size": 5, "value_size": 8, "decay": "key", "beta": "none", "cell": "identity"},
        {"value_size": 8, "decay": "none", "expansion": 1.0, "beta_max": 2.0, "bound": 2.0},
    ],
    "ladder_2": [{"groups": 4, "expansion": 1.5}],
    "ladder_4": [{"groups": 4, "constraint": "scaled_orthogonal"}],
    "ladder_5": [{"groups": 1, "structure": "low_rank", "rank": 3}],
    "ladder_6": [{"groups": 4}],
    "log_0": [{"groups": 4}],
    "log_2": [{"groups": 4, "structure": "low_rank", "rank": 3}],
    "rnn": [{"kernels": "elman"}],
    "gru": [{"kernels": "elman"}],
    "lstm": [{"kernels": "elman", "expansion": 1.5}],
    "mingru": [{"expansion": 1.5}],
    "mamba2": [{"d_state": 8, "headdim": 8, "d_conv": 3, "expand": 1.5}],
    "transformer": [{"head_dim": 8, "mlp": 2.0}],
}
VARIANTS = [mixer_config(name)(**options) for name in mixer_names() for options in ({}, *OPTIONS.get(name, []))]
B, T = BATCH, STEPS

variants = pytest.mark.parametrize("mixer", VARIANTS, ids=str)
#: PyTorch's compiler warns of its own code.
compiles = pytest.mark.filterwarnings(r"ignore:::torch\b")


@variants
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_it_keeps_to_what_every_variant_does(mixer: MixerConfig, check: Check) -> None:
    check.run(mixer)


@variants
def test_a_model_starts_as_its_embedding_and_every_parameter_learns(mixer: MixerConfig) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(16, 2, (mixer,)), "zero_out").double()
    assert all(layer.mixer.outputs for layer in model.layers) or mixer.name == "e5"  # which writes its states
    text, optimizer = tokens(), torch.optim.SGD(model.parameters(), lr=1e-2)
    if mixer.name != "e5":
        embedded = model.embedding(text.int())
        plain = (
            torch.nn.functional.rms_norm(embedded, embedded.shape[-1:], eps=torch.finfo(torch.float32).eps)
            @ model.embedding.weight.T
        )
        torch.testing.assert_close(model(text)[0], plain, rtol=1e-3, atol=1e-6)
    # The first step moves what writes to the stream, the second one the rest too.
    for _ in range(2):
        optimizer.zero_grad()
        next_token_loss(model(text)[0], tokens(3)).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert 0 < parameter.grad.abs().max() < math.inf, name


def test_how_matrices_start() -> None:
    torch.manual_seed(0)
    config = ModelConfig(400, 1, (mixer_config("e1")(),))
    for weight_init, scale, out, embedding in (
        ("normal", 0.02, 0.02, 0.02), ("fan_in", 0.05, 0.02, 0.02), ("zero_out", 0.05, 0.0, 0.01),
    ):  # fmt: skip
        model = LanguageModel(config, weight_init)  # type: ignore[arg-type]
        mixer = model.layers[0].mixer
        found = [
            weight.std().item() for weight in (mixer.in_proj.weight, mixer.out_proj.weight, model.embedding.weight)
        ]
        assert found == pytest.approx([scale, out, embedding], rel=0.02)


def gradients(model: LanguageModel, text: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    next_token_loss(model(text)[0], targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def compile_counting(model: LanguageModel, backend: str) -> CompileCounterWithBackend:
    """Compile the model's training, anew even where a test before did, and count the compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    model.compile_training(functools.partial(torch.compile, fullgraph=True, backend=counter))
    return counter


@variants
@compiles
def test_compiled_training_is_plain_training_and_one_compilation_a_kind_of_layer(mixer: MixerConfig) -> None:
    model, text, targets = build(mixer, depth=4), tokens(), tokens(3)
    plain = gradients(model, text, targets)
    counter = compile_counting(model, "aot_eager")
    torch.testing.assert_close(gradients(model, text, targets), plain)
    kinds = {type(layer.mixer) for layer in model.layers if layer.mixer.compiles}
    assert counter.frame_count == 1 + len(kinds)  # the first norm and the layers
    model.eval()(tokens(4)[:, :5])
    assert counter.frame_count == 1 + len(kinds)


@compiles
def test_compiled_training_takes_a_pattern_and_chunks_of_any_length() -> None:
    model, text = build(mixer_config("e0")(), mixer_config("e1")(), depth=4), torch.randint(256, (B, 60))
    whole, last = model(text)
    with torch._dynamo.config.patch(recompile_limit=64):
        counter = compile_counting(model, "aot_eager")
        counts, state, pieces = [], None, []
        for chunk in text.split([7, 5, 1, 9, 3, 12, 8, 1, 10, 4], dim=1):
            logits, state = model(chunk, state)
            pieces.append(logits)
            counts.append(counter.frame_count)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(state, last)
    # Without a state, with one, of any length, of length 1: after that every length has been compiled for.
    assert counts[2] == counts[-1]


def test_autocast_keeps_the_residual_stream_and_rounds_what_products_read() -> None:
    model = build(mixer_config("e1")()).float()
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, inputs, outputs: seen.append((inputs[1].dtype, outputs[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens())
    assert seen == [(torch.bfloat16, torch.float32)] * 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")  # the official Mamba2
@pytest.mark.parametrize("name", mixer_names())
@compiles
def test_compiled_training_on_the_gpu_errs_no_more_than_plain(name: str) -> None:
    """Over float64, as a multiple of what plain autocast errs; and twice the same bits where the kernels are ours.

    Two errors of a few numbers differ much by chance (12 of them by 2.6 times in one case of 1,000), so those of all
    tensors that hold fewer than 64 are judged together, and less strictly.
    """
    model = build(mixer_config(name)(), dim=64).cuda()
    text, targets = (torch.randint(256, (16, 64), device="cuda") for _ in range(2))
    exact = gradients(model, text, targets)
    model.float()
    with torch.autocast("cuda", torch.bfloat16):
        plain = gradients(model, text, targets)
        compile_counting(model, "inductor")
        compiled, again = gradients(model, text, targets), gradients(model, text, targets)
    few = torch.zeros(2, dtype=torch.float64, device="cuda")
    for name, truth in exact.items():
        errors = torch.stack([(found[name].double() - truth).norm() for found in (compiled, plain)])
        if truth.numel() < 64:
            few += errors.square()
        else:
            assert 0 < errors[0] <= 1.5 * errors[1], name
        assert torch.equal(compiled[name], again[name]) or not all(layer.mixer.compiles for layer in model.layers), name
    assert few[0] <= 9 * few[1]


def test_a_pattern_repeats_over_the_depth() -> None:
    a, b = mixer_config("e0")(), mixer_config("e1")()
    config = ModelConfig(16, 5, (a, b))
    assert [mixer.name for mixer in config.layers()] == ["e0", "e1", "e0", "e1", "e0"]
    assert config.pattern == "e0,e1"
    assert num_params(config) == sum(parameter.numel() for parameter in LanguageModel(config).parameters())


def test_what_a_mixer_returns_is_not_broadcast() -> None:
    model = build(mixer_config("e0")())
    model.layers[1].mixer.out_proj = torch.nn.Linear(16, 1).double()
    with pytest.raises(AssertionError, match=r"E0 made \(11, 3, 1\) of an x of \(11, 3, 16\), not the same"):
        model(tokens())


def test_a_variant_has_the_name_that_it_is_registered_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mixers._REGISTRY, "mine", "elman.mixers.e0:E0Config")
    with pytest.raises(AssertionError, match=r"E0Config\.name is 'e0', but _REGISTRY has it as 'mine'"):
        mixer_config("mine")


@variants
def test_config_survives_json(mixer: MixerConfig) -> None:
    config = ModelConfig(16, 2, (mixer,))
    assert ModelConfig.from_dict(config.to_dict()) == config


@variants
def test_a_saved_and_loaded_model_gives_the_same_logits(mixer: MixerConfig, tmp_path: Path) -> None:
    model, text = build(mixer), tokens()
    logits, _ = model(text)
    path = save_checkpoint(tmp_path, Checkpoint(1, model.state_dict(), {}))
    loaded = LanguageModel(ModelConfig.from_dict(model.config.to_dict())).double()
    loaded.load_state_dict(load_checkpoint(path, with_trainer=False).model)
    assert torch.equal(loaded(text)[0], logits)


def test_a_hybrid_streams_and_resets_like_its_parts() -> None:
    names = ("e1", "mamba2", "lstm", "transformer", "mingru")
    model, text = build(*(mixer_config(name)() for name in names), depth=len(names)), tokens()
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[1, 6] = True
    whole, _ = model(text, None, reset)
    first, state = model(text[:, :4])
    rest, _ = model(text[:, 4:], state, reset[:, 4:])
    torch.testing.assert_close(torch.cat((first, rest), 1), whole)
    torch.testing.assert_close(whole[1:2, 6:], model(text[1:2, 6:])[0])


def test_loss_is_that_of_plain_cross_entropy() -> None:
    logits = torch.randn(B, T, 256, dtype=torch.float64)
    targets = tokens()
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 256), targets.reshape(-1).long())
    torch.testing.assert_close(next_token_loss(logits, targets), expected.float())


def test_bad_input_is_named() -> None:
    model = build(mixer_config("e1")())
    with pytest.raises(UsageError, match=r"give \(B, T\)"):
        model(torch.zeros(4, dtype=torch.long))
    with pytest.raises(UsageError, match=r"tokens has dtype torch.float32: give integers"):
        model(torch.full((1, 4), 0.5))
    with pytest.raises(UsageError, match=r"reset has shape \(3, 4\)"):
        model(tokens(), reset=torch.zeros(3, 4, dtype=torch.bool))
    with pytest.raises(UsageError, match="--dim 0"):
        replace(model.config, dim=0)
    with pytest.raises(UsageError, match="--expansion 0"):
        mixer_config("e1")(expansion=0.0)

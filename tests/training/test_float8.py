"""Large products in 8 bits: which take part, what they cost in exactness, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from elman.errors import UsageError
from elman.mixers import mixer_config
from elman.model import LanguageModel, ModelConfig, next_token_loss
from elman.training import float8
from elman.training.config import TrainConfig
from elman.training.float8 import check_float8, takes_part, use_float8
from elman.training.run import RunFolder, load_model
from tests.training.runs import losses, resume, start

#: Of torchao, in a process that has just imported it, and of autocast on a CPU, which it asks for by an old name.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("module", "takes"),
    [
        (nn.Linear(256, 512), True),
        (nn.Linear(256, 248), False),
        (nn.Linear(264, 512), False),
        (nn.Linear(128, 4096), False),
        (nn.Embedding(256, 512), False),
        (nn.LayerNorm(256), False),
    ],
    ids=str,
)
def test_linear_layers_with_long_sides_take_part(module: nn.Module, takes: bool) -> None:
    assert takes_part(module) == takes


def test_products_are_rounded_and_weights_keep_their_names() -> None:
    """Of a model with one large product a layer: the recurrent matrix and the embedding stay as they are."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(256, 2, (mixer_config("e1")(),)))
    text = torch.randint(256, (2, 17))
    names = {name: value.clone() for name, value in model.state_dict().items()}
    exact = next_token_loss(model(text[:, :-1])[0], text[:, 1:])
    gradient = torch.autograd.grad(exact, model.layers[0].mixer.out_proj.weight)[0]
    assert use_float8(model, emulate=True) == 6
    assert {name: value.shape for name, value in model.state_dict().items()} == {k: v.shape for k, v in names.items()}
    rounded = next_token_loss(model(text[:, :-1])[0], text[:, 1:])
    assert 0 < abs(rounded - exact) < 0.02 * exact
    found = torch.autograd.grad(rounded, model.layers[0].mixer.out_proj.weight)[0]
    assert 1e-3 < (found - gradient).norm() / gradient.norm() < 0.3
    with torch.inference_mode():
        assert torch.equal(next_token_loss(model.eval()(text[:, :-1])[0], text[:, 1:]), exact)


def test_a_model_without_a_large_product_is_refused() -> None:
    model = LanguageModel(ModelConfig(64, 1, (mixer_config("e1")(),)))
    with pytest.raises(UsageError, match=r"no linear layer .* at least 256: give a wider model, or --precision bf16"):
        use_float8(model, emulate=True)


def test_what_a_device_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    with pytest.raises(UsageError, match=r"--precision fp8 needs an NVIDIA GPU, not device cpu: give --precision auto"):
        check_float8(torch.device("cpu"), 16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UsageError, match=r"needs compute capability 8\.9 .* not 8\.0: give --precision bf16"):
        check_float8(gpu, 16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UsageError, match=r"16 tokens at a time, and a pass has 24: give a --batch-size or --seq-len"):
        check_float8(gpu, 24)
    check_float8(gpu, 32)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UsageError, match=r"--precision fp8 needs torchao .*: pip install torchao, or give"):
        check_float8(gpu, 32)


def test_a_run_is_trained_resumed_and_read_without_it(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, by stand-ins for the products: the losses of a resumed run are the same bits."""
    monkeypatch.setattr("elman.training.loop.check_float8", lambda device, tokens: None)
    monkeypatch.setattr("elman.training.loop.use_float8", lambda model: use_float8(model, emulate=True))
    monkeypatch.setattr(float8, "_LEAST_SIDE", 16)
    config = replace(config, precision="fp8", schedule="constant", steps=6, save_every=3)
    start(replace(config, out=tmp_path / "whole"))
    start(replace(config, steps=3))
    resume(config, steps=6)
    assert losses(config.out) == losses(tmp_path / "whole")
    start(replace(config, out=tmp_path / "plain", precision="bf16"))
    assert losses(tmp_path / "plain") != losses(config.out)
    assert losses(tmp_path / "plain")[6] == pytest.approx(losses(config.out)[6], rel=0.02)
    assert RunFolder(config.out).read_json("env.json")[0]["precision"] == "fp8"  # type: ignore[arg-type]
    model = load_model(config.out)  # type: ignore[arg-type]
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no 8-bit tensor cores"
)
def test_on_the_gpu_its_losses_stay_near_those_of_bf16(config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = replace(config, device="cuda", dim=256, batch_size=8, seq_len=32, steps=60, compile="on")
    start(replace(config, precision="bf16", out=tmp_path / "bf16"))
    start(replace(config, precision="fp8"))
    ours, theirs = losses(config.out), losses(tmp_path / "bf16")
    assert ours != theirs
    assert ours[60] < 0.9 * ours[1]
    assert ours[60] == pytest.approx(theirs[60], rel=0.05)

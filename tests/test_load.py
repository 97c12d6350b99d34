"""``elman.load``: a run's model in one call, and ``import elman`` that costs nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import elman
import elman.training.run
from elman.errors import UsageError
from elman.mixers import mixer_config
from elman.model import LanguageModel, ModelConfig
from elman.training.checkpoint import Checkpoint, save_checkpoint
from elman.training.config import TrainConfig
from elman.training.run import RunFolder

CONFIG = ModelConfig(dim=8, depth=1, mixers=(mixer_config("e1")(),))


@pytest.fixture
def models(tmp_path: Path) -> dict[int, LanguageModel]:
    """Of the checkpoints of a run in ``tmp_path``, by step."""
    run = RunFolder(tmp_path)
    run.write_config(TrainConfig(data=tmp_path / "text", steps=8), CONFIG)
    made = {}
    for step in (4, 8):
        torch.manual_seed(step)
        made[step] = LanguageModel(CONFIG)
        save_checkpoint(run.checkpoints, Checkpoint(step, made[step].state_dict(), {}))
    return made


@pytest.mark.parametrize(("options", "step"), [({}, 8), ({"checkpoint": 8}, 8), ({"checkpoint": 4}, 4)])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_checkpoint_comes_back(
    models: dict[int, LanguageModel],
    tmp_path: Path,
    options: dict[str, Any],
    step: int,
    dtype: torch.dtype | None,
    device: str,
) -> None:
    for run in (tmp_path, str(tmp_path)):
        model = elman.load(run, **options, device=device, dtype=dtype)
        assert not model.training
        tokens = torch.tensor([list(b"import ")], device=device)
        logits, _ = model(tokens)
        expected, _ = models[step].to(device, dtype)(tokens)
        assert logits.dtype == (dtype or torch.float32)
        assert torch.equal(logits, expected)


def test_a_damaged_newest_is_passed_over_but_not_when_asked_for(
    models: dict[int, LanguageModel], tmp_path: Path
) -> None:
    (tmp_path / "checkpoints" / "step-00000008" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="going by step-00000004, which is whole"):
        model = elman.load(tmp_path)
    assert torch.equal(model.embedding.weight, models[4].embedding.weight)
    with pytest.raises(UsageError, match="step-00000008 is damaged"):
        elman.load(tmp_path, checkpoint=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": 5}, r"checkpoint=5 is not in .*: give one of 4, 8"),
        ({"device": "tpu"}, "'tpu' is unknown: give cpu, cuda"),
        ({"dtype": torch.int8}, r"dtype=torch.int8 cannot hold weights: give a floating-point one"),
        ({"dtype": torch.float8_e4m3fn}, r"dtype=torch.float8_e4m3fn cannot hold weights"),
        ({"dtype": "bfloat16"}, r"dtype=bfloat16 cannot hold weights: .*, such as torch.bfloat16"),
    ],
)
def test_bad_options_are_named(
    models: dict[int, LanguageModel], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        elman.load(tmp_path, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 1 << 17}, r"embedding.weight is \(256, 8\) but config.json asks for \(256, 131072\)"),
        ({"depth": 1024}, r"it holds 2,392 numbers but config.json asks for [\d,]+; give the run folder"),
        ({"depth": 10**30}, r"--depth 10+ is out of range: give at most 1024"),
        ({"dim": 10**30}, r"--dim 10+ is out of range: give at most 131072"),
        ({"dim": True}, r"--dim True is out of range"),
    ],
)
def test_a_model_far_too_large_for_its_checkpoint_is_refused_before_it_is_built(
    models: dict[int, LanguageModel],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "model": {**values["model"], **changes}}))
    monkeypatch.setattr(elman.training.run, "LanguageModel", lambda config: pytest.fail("it was built"))
    with pytest.raises(UsageError, match=message):
        elman.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "option", "value", "message"),
    [
        ("train", "seq_len", 1.5, "--seq-len 1.5 is of the wrong type: give a whole number"),
        ("train", "batch_size", True, "--batch-size True is of the wrong type"),
        ("train", "heldout", "much", "--heldout 'much' is of the wrong type: give a number"),
        ("train", "tokenizer", ["gpt2"], r"--tokenizer \['gpt2'\] is of the wrong type: give text"),
        ("train", "profile", 1, "--profile 1 is of the wrong type: give true or false"),
        ("train", "warmup", "5%", "--warmup '5%' is of the wrong type: give a number"),
        ("train", "data", 7, "expected str"),
        ("mixer", "expansion", None, "--expansion None is of the wrong type: give a number"),
        ("mixer", "conv", 2.5, "--conv 2.5 is of the wrong type: give a whole number"),
        ("mixer", "gate", ["hx"], r"--gate \['hx'\] is unknown: choose one of split, hx, sigmoid"),
    ],
)
def test_an_edited_config_is_told_by_option(
    models: dict[int, LanguageModel], tmp_path: Path, part: str, option: str, value: Any, message: str
) -> None:
    values = json.loads((tmp_path / "config.json").read_text())
    (values["train"] if part == "train" else values["model"]["mixers"][0])[option] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=f"config.json is not as elman train wrote it .*{message}"):
        elman.load(tmp_path)


def test_a_variant_that_has_changed_since_may_be_why(models: dict[int, LanguageModel], tmp_path: Path) -> None:
    values = json.loads((tmp_path / "config.json").read_text())
    (mixer,) = values["model"]["mixers"]
    (tmp_path / "config.json").write_text(
        json.dumps(values | {"model": {**values["model"], "mixers": [{**mixer, "k": 2}]}})
    )
    with pytest.raises(
        UsageError, match=r"argument 'k'\): put the file back, or its variant's code if that has changed"
    ):
        elman.load(tmp_path)
    narrow = {**values["model"], "mixers": [{**mixer, "expansion": 0.5}]}
    (tmp_path / "config.json").write_text(json.dumps({**values, "model": narrow}))
    with pytest.raises(UsageError, match=r"belongs to another model: .*, or its variant's code as it was then"):
        elman.load(tmp_path)


def test_no_run_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run folder"):
        elman.load(tmp_path)
    RunFolder(tmp_path).write_config(TrainConfig(data=tmp_path / "text", steps=8), CONFIG)
    for options in ({}, {"checkpoint": 4}):
        with pytest.raises(UsageError, match="has no checkpoint yet"):
            elman.load(tmp_path, **options)  # type: ignore[arg-type]


def test_import_elman_imports_no_torch() -> None:
    code = "import elman, sys; assert callable(elman.load); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)

"""Exports: what they hold, that they need no elman, and what transformers, where it is installed, makes of them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from elman.cli import main
from elman.export.bundle import bundle
from elman.export.huggingface import export, tokenizer_json
from elman.generation import Decoder, Sampling, as_bytes
from elman.mixers import mixer_config, mixer_names, parse_pattern
from elman.model import LanguageModel, ModelConfig
from elman.training.run import load_model, load_text

ROOT = Path(__file__).parent.parent.parent
TINY = ["--dim", "16", "--depth", "2", "--seq-len", "32", "--batch-size", "4", "--eval-bytes", "200", "--device", "cpu"]
TEXT, SHORT = "line 1 of\x1eanother", "li"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(b"".join(b"line %d of a text\n\x1e" % i for i in range(500)))
    return tmp_path


def train(*options: str) -> None:
    assert main(["train", "--data", "text", "--out", "run", "--steps", "2", *TINY, *options]) == 0


def expected(run: Path) -> dict[str, Any]:
    """What a run's model makes of a text, and how it goes on."""
    model, (_, resets) = load_model(run), load_text(run)
    tokens = torch.tensor([list(TEXT.encode())])
    reset = torch.zeros_like(tokens, dtype=torch.bool)
    reset[0, TEXT.index("\x1e") + 1] = resets
    texts = {}
    for text in (TEXT, SHORT):
        decoder = Decoder(model, 1, Sampling(temperature=0), resets=resets)
        decoder.read([as_bytes(text.encode())])
        texts[text] = [int(decoder.step()) for _ in range(12)]
    with torch.no_grad():
        return {"logits": model(tokens, None, reset if resets else None)[0].clone(), "texts": texts}


def test_the_bundle_needs_no_elman_and_computes_the_same(tmp_path: Path) -> None:
    """Every variant, in one process where neither elman nor what it depends on can be imported."""
    tokens = torch.tensor([list(TEXT.encode())])
    cases = []
    for name in mixer_names():
        torch.manual_seed(0)
        config = ModelConfig(16, 2, (mixer_config(name)(),))
        model = LanguageModel(config).eval()
        with torch.no_grad():
            logits, _ = model(tokens)
        cases.append({"config": config.to_dict(), "weights": model.state_dict(), "logits": logits.clone()})
    torch.save(cases, tmp_path / "cases.pt")
    files = {type(mixer_config(name)()).__module__.removeprefix("elman.") for name in mixer_names()}
    (tmp_path / "elman_code.py").write_text(bundle(["model", *files]))
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("elman", "tyro", "cuda", "tiktoken", "scipy", "rich", "safetensors"), None))
sys.path.insert(0, {str(tmp_path)!r})
import importlib, torch
from elman_code import load
assert load() is load()
model = importlib.import_module(load().__name__ + ".model")
for case in torch.load({str(tmp_path / "cases.pt")!r}):
    made = model.LanguageModel(model.ModelConfig.from_dict(case["config"])).eval()
    made.load_state_dict(case["weights"])
    with torch.no_grad():
        logits, _ = made(torch.tensor([{list(TEXT.encode())}]))
    torch.testing.assert_close(logits, case["logits"])
    print(case["config"]["mixers"][0]["name"])
assert not [name for name in sys.modules if name.startswith("elman.")]
assert sys.modules.get("tyro") is None
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == mixer_names()


def test_the_bundle_holds_what_the_variant_needs_and_no_more() -> None:
    held = set(re.findall(r"^    ['\"]([\w.]*)['\"]: \(", bundle(["model", "mixers.e1"]), re.MULTILINE))
    assert {"", "model", "mixers", "mixers.e1", "ops", "ops.reference", "ops.cuda.compiler", "errors"} <= held
    assert not {"mixers.transformer", "training", "training.run", "ops.narrow", "ops.wide", "cli"} & held
    # What looks for imports by lines finds those of the loader alone.
    found = re.findall(r"^\s*(?:from|import)\s+(\S+)", bundle(["model", "mixers.e1"]), re.MULTILINE)
    assert set(found) <= {"contextlib", "importlib", "importlib.abc", "importlib.util", "sys", "types", "tyro"}


def test_every_byte_is_a_token_of_its_own() -> None:
    vocabulary = tokenizer_json()["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256))
    assert vocabulary["a"] == ord("a")
    assert vocabulary["\x1e"] == 0x1E
    assert vocabulary["Ġ"] == ord(" ")  # as GPT-2's vocabulary shows a space


def test_a_folder_is_made_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("--sampling", "documents")
    assert main(["export", "run", "--to", "hf"]) == 0
    shown = capsys.readouterr().out
    assert "exported to run/hf: " in shown
    assert "from_pretrained('run/hf', trust_remote_code=True)" in shown
    made = {file.name for file in Path("run/hf").iterdir()}
    assert made == {
        "README.md", "config.json", "configuration_elman.py", "elman_code.py", "generation_config.json",
        "model.safetensors", "modeling_elman.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    card = Path("run/hf/README.md").read_text()
    compile(card.split("```")[1].removeprefix("python"), "README.md", "exec")
    assert "tokenizer = AutoTokenizer.from_pretrained(folder" in card
    config = json.loads(Path("run/hf/config.json").read_text())
    assert config["resets"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_elman.ElmanForCausalLM"
    before = Path("run/hf/config.json").stat()
    mistakes = {
        ("export", "run"): "--out run/hf is there already and is left as it is: give another --out",
        ("export", "run", "--out", "text"): "--out text is a file",
        ("export", "nowhere"): "RUN nowhere: no such folder",
        ("export", "run/checkpoints"): "RUN run/checkpoints is no run folder",
        ("export", "run/hf"): "RUN run/hf is an export: give the run folder that it was made of",
        ("generate", "run/hf"): "RUN run/hf is an export",
    }
    for argv, message in mistakes.items():
        assert main(list(argv)) == 2
        assert re.search(message, capsys.readouterr().err)
    assert Path("run/hf/config.json").stat() == before
    assert sorted(file.name for file in Path("run").iterdir() if "partial" in file.name) == []


def test_an_empty_folder_is_filled_and_stays_what_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train()
    Path("real").mkdir()
    Path("link").symlink_to("real")
    assert main(["export", "run", "--out", "link"]) == 0
    assert Path("link").is_symlink()
    Path("here").mkdir()
    inode = Path("here").stat().st_ino
    monkeypatch.chdir("here")
    assert main(["export", "../run", "--out", "."]) == 0
    assert Path("../here").stat().st_ino == inode
    names = {file.name for file in Path(".").iterdir()}
    assert names == {file.name for file in Path("../real").iterdir()} >= {"config.json", "model.safetensors"}
    assert not list(folder.glob(".*partial"))


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize(
    ("options", "without"),
    [
        (("--model", "e1", "--sampling", "documents"), False),
        (("--model", "e10,transformer"), True),
        (("--model", "mamba2"), True),
    ],
)
def test_transformers_runs_an_export(options: tuple[str, ...], without: bool, folder: Path) -> None:
    assert parse_pattern(options[1])
    train(*options)
    export(Path("run"), Path("exported"), print)
    torch.save(expected(Path("run")), "expected.pt")
    script = str(ROOT / "tests" / "export" / "check_transformers.py")
    command = [sys.executable, script, str(folder / "exported"), "expected.pt", *["--without-elman"] * without]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert "as expected" in finished.stdout

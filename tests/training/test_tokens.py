"""Runs on tokens that are made from the raw file on the way."""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from elman import writing
from elman.data.bytes import open_bytes
from elman.errors import UsageError
from elman.generation import generate
from elman.mixers import mixer_config
from elman.model import next_token_loss
from elman.training.config import TrainConfig
from elman.training.run import RunFolder, load_model, load_text, open_run
from elman.training.start import resume_run, start_run
from elman.units import bits
from tests.data.tiny_encoding import NAME, tiny
from tests.training.runs import losses

__all__ = ["tiny"]

E1 = (mixer_config("e1")(),)


@pytest.fixture
def config(tmp_path: Path, tiny: str) -> TrainConfig:
    text = tmp_path / "text"
    text.write_bytes(
        b"".join("the quick fox {i} é over the fence.\x1e".replace("{i}", str(i)).encode() for i in range(900))
    )
    return TrainConfig(
        data=text, out=tmp_path / "run", dim=16, depth=2, seq_len=24, batch_size=8, steps=12, warmup=2, lr=1e-2,
        device="cpu", eval_every=5, save_every=4, eval_bytes="500", tokenizer=tiny, workers=1,
    )  # fmt: skip


def start(config: TrainConfig) -> tuple[int, str]:
    output = io.StringIO()
    return start_run(config, E1, Console(file=output, width=100)), output.getvalue()


@pytest.mark.parametrize("sampling", ["windows", "documents"])
def test_heldout_loss_is_by_token_and_by_byte(config: TrainConfig, sampling: str) -> None:
    code, output = start(replace(config, eval_bytes="1m", sampling=sampling))  # type: ignore[arg-type]
    assert code == 0
    assert config.out is not None
    assert config.data is not None
    vocabulary, resets = load_text(config.out)
    assert resets == (sampling == "documents")
    model = load_model(config.out)
    assert model.config.vocab_size == vocabulary.size == 304
    tokens = vocabulary.encode(open_bytes(config.data, config.heldout).heldout)
    total, count, num_bytes = 0.0, 0, 0
    for begin in range(0, len(tokens) - config.seq_len, config.seq_len):
        window = tokens[begin : begin + config.seq_len + 1]
        inner = (np.flatnonzero(window[:-2] == vocabulary.delimiter) + 1).tolist() if resets else []
        for first, end in itertools.pairwise([0, *inner, config.seq_len]):
            targets = torch.tensor(window[None, first + 1 : end + 1])
            total += next_token_loss(model(torch.tensor(window[None, first:end]))[0], targets, reduction="sum").item()
        count += config.seq_len
        num_bytes += sum(len(vocabulary.pieces[token]) for token in window[1:])
    summary = RunFolder(config.out).read_json("summary.json")
    reported = summary["heldout"]
    assert (reported["tokens"], reported["bytes"], summary["unit"]) == (count, num_bytes, "token")
    assert reported["nats_per_token"] == pytest.approx(total / count, rel=1e-5)
    assert reported["bits_per_byte"] == pytest.approx(bits(total / num_bytes), rel=1e-5)
    assert reported["bits_per_byte"] < bits(reported["nats_per_token"])
    assert f"{reported['nats_per_token']:.4f} nats/token" in output
    assert f"{reported['bits_per_byte']:.4f} bits/byte" in output


@pytest.mark.parametrize("sampling", ["windows", "tbptt"])
def test_a_run_learns_and_resumes_exactly_with_any_number_of_workers(
    config: TrainConfig, tmp_path: Path, sampling: Any
) -> None:
    config = replace(config, sampling=sampling)
    start(replace(config, out=tmp_path / "whole", steps=40, schedule="constant"))
    start(replace(config, steps=21, schedule="constant"))
    assert config.out is not None
    saved, model = open_run(config.out).read_config()
    resumed = replace(saved, resume=config.out, steps=40, workers=0)
    assert resume_run(resumed, model.mixers, Console(quiet=True)) == 0
    assert losses(config.out) == losses(tmp_path / "whole")
    assert losses(config.out)[40] < 0.6 * losses(config.out)[1]


def test_a_tokenized_model_writes_bytes(config: TrainConfig) -> None:
    start(replace(config, steps=60))
    assert config.out is not None
    model = load_model(config.out)
    vocabulary, _ = load_text(config.out)
    prompt = "the quick fox 1 é".encode()
    for num_bytes in (0, 1, 7, 50):
        drawn = bytes(generate(model, prompt, num_bytes, seed=1, vocabulary=vocabulary))
        assert len(drawn) == num_bytes
    greedy = bytes(generate(model, prompt, 40, temperature=0, vocabulary=vocabulary))
    tokens = vocabulary.encode(np.frombuffer(prompt, dtype=np.uint8)).tolist()
    length = len(prompt) + 40
    while sum(len(vocabulary.pieces[token]) for token in tokens) < length:
        logits, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1, :270].argmax()))
    assert b"".join(vocabulary.pieces[token] for token in tokens)[:length] == prompt + greedy
    # Numbers that stand for no text are never drawn, however likely.
    with torch.no_grad():
        model.embedding.weight[290] = 0
        model.norm.weight.zero_()
    assert len(bytes(generate(model, b"", 200, temperature=100, vocabulary=vocabulary))) == 200

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    assert writing.generate(writing.Request(config.out, ("the é",), num_bytes=30, device="cpu"), terminal) == 0
    assert terminal.getvalue().startswith("the é")


def test_mistakes_are_named_before_anything_is_made(config: TrainConfig) -> None:
    assert config.out is not None
    with pytest.raises(UsageError, match="--tokenizer 'p5' is unknown"):
        start(replace(config, tokenizer="p5"))
    with pytest.raises(UsageError, match=r"--batch-size 2048 streams by --seq-len 24 tokens, .*: give a smaller"):
        start(replace(config, batch_size=2048, sampling="tbptt"))
    with pytest.raises(UsageError, match=r"--seq-len 1400 needs windows of 1401 tokens, but the held-out part has"):
        start(replace(config, seq_len=1400))
    assert not config.out.exists()


def test_another_vocabulary_under_the_same_name_is_refused(config: TrainConfig) -> None:
    start(config)
    assert config.out is not None
    saved, model = open_run(config.out).read_config()
    RunFolder(config.out).write_config(saved, replace(model, vocab_size=296))
    with pytest.raises(UsageError, match=r"has 304 tokens, but the model was made for 296: install the tiktoken that"):
        resume_run(replace(saved, resume=config.out, steps=20), model.mixers, Console(quiet=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_ends_in_a_checkpoint(config: TrainConfig, number: signal.Signals) -> None:
    """As a terminal sends it, and a scheduler: the workers get it too."""
    code = (
        "import sys, tiktoken; from tests.data.tiny_encoding import NAME, constructor; tiktoken.list_encoding_names();"
        "tiktoken.registry.ENCODING_CONSTRUCTORS[NAME] = constructor; from elman.cli import main;"
        "sys.exit(main(sys.argv[1:]))"
    )
    options = f"--data {config.data} --out {config.out} --tokenizer {NAME} --workers 2 --dim 16 --depth 2 --seq-len 32"
    rest = "--batch-size 8 --steps 1000000 --eval-bytes 500 --device cpu"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", *options.split(), *rest.split()],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert config.out is not None
    deadline = time.monotonic() + 60
    while not (config.out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert load_model(config.out) is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left

"""Runs that learn a task: what they read, learn and leave, and what their accuracies are."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from elman.cli import main
from elman.data.loading import Loader
from elman.evaluation.accuracy import draw_examples, measure
from elman.evaluation.tasks import find_task
from elman.mixers import MixerConfig, mixer_config
from elman.model import IGNORED, LanguageModel, ModelConfig, next_token_loss
from elman.training.config import TaskConfig
from elman.training.loop import Trainer
from elman.training.run import RunFolder, open_run
from elman.training.start import resume_run, start_run
from elman.training.task import TaskSampler
from tests.training.runs import E1, losses


@pytest.fixture
def config(tmp_path: Path) -> TaskConfig:
    return TaskConfig(
        task="parity", out=tmp_path / "run", dim=16, depth=1, seq_len=8, batch_size=8, steps=6, warmup=2, lr=1e-2,
        device="cpu", eval_every=3, eval_examples=20, eval_multiples=(2, 5), schedule="constant",
    )  # fmt: skip


def start(config: TaskConfig, mixers: tuple[MixerConfig, ...] = E1) -> int:
    return start_run(config, mixers, Console(quiet=True))


def command(*argv: object) -> int:
    try:
        return main(["task", *map(str, argv)])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.whole_endings
def test_the_command_learns_parity_and_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    options = "--dim 32 --depth 1 --train-length 8 --batch-size 32 --steps 250 --lr 1e-2 --warmup 10 --device cpu"
    assert command("parity", "--model", "e1", *options.split(), "--out", "run") == 0
    said = capsys.readouterr().out
    summary = json.loads(Path("run/summary.json").read_text())
    found = summary["accuracies"]
    assert summary["task"] == "parity"
    assert [values["length"] for values in found] == [8, 16, 32, 80]
    assert [values["chance"] for values in found] == [0.5] * 4
    assert found[0]["accuracy"] > 0.97
    assert found[0]["beyond"] is None
    assert found[1]["beyond"] > 0.9
    assert json.loads(Path("run/config.json").read_text())["train"]["task"] == "parity"
    assert json.loads(Path("run/env.json").read_text())[0]["backends"] == ["reference"]
    assert losses(Path("run"))[250] < 0.1
    for name in ("accuracy.png", "loss.png"):
        assert Path("run", name).read_bytes().startswith(b"\x89PNG")
    assert not Path("run/sample.txt").exists()
    assert f"{found[0]['accuracy']:.1%} at length 8" in said
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    assert command("parity", *options.split(), "--out", "run") == 2
    assert "holds another run" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}


def test_a_step_reads_examples_of_the_task_a_function_of_the_step() -> None:
    for name, lengths in (("s3", {12}), ("copying", set(range(3, 13)))):
        task = find_task(name)
        sampler = TaskSampler(task, 12, 6, seed=3)
        seen = set()
        for step in range(60):
            batch = sampler.batch(step)
            assert batch.targets is not None
            counts = batch.targets != IGNORED
            end = np.flatnonzero(counts.any(axis=0)).max() + 1
            seen.add(int(end + (name == "copying" and batch.tokens[0, end : end + 1].any())))
            # Behind the example there is nothing that counts, and before it nothing is another task's.
            parts = [sampler.batch(step, rank, 3) for rank in range(3)]
            assert np.array_equal(np.concatenate([part.tokens for part in parts]), batch.tokens)
            assert np.array_equal(np.concatenate([part.targets for part in parts]), batch.targets)  # type: ignore[type-var]
        assert seen == lengths
        assert not np.array_equal(sampler.batch(0).tokens, TaskSampler(task, 12, 6, seed=4).batch(0).tokens)
        judged = draw_examples(task, 6, 12)
        assert not np.array_equal(judged.tokens, TaskSampler(task, 12, 6, seed=0).batch(12).tokens)


def test_workers_make_the_same_batches() -> None:
    sampler = TaskSampler(find_task("mqar"), 24, 4, seed=1)
    plain, ahead = Loader(sampler), Loader(sampler, workers=1)
    for step in range(4):
        for a, b in zip(plain.batch(step).pairs(), ahead.batch(step).pairs(), strict=True):
            assert torch.equal(a, b)
    ahead.close()


def test_the_loss_is_the_mean_over_what_counts() -> None:
    logits = torch.randn(3, 5, 8)
    targets = torch.randint(8, (3, 5))
    mask = torch.rand(3, 5) < 0.5
    mask[0, 0] = True
    expected = torch.stack([-logits.log_softmax(-1)[i, t, targets[i, t]] for i, t in mask.nonzero().tolist()]).mean()
    assert next_token_loss(logits, targets.where(mask, IGNORED)) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["e1", "gru", "transformer", "mamba2"])
@pytest.mark.parametrize("task_name", ["dyck_2", "copying"])
def test_accuracy_by_a_carried_state_is_that_of_one_piece(name: str, task_name: str) -> None:
    task = find_task(task_name)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(16, 2, (mixer_config(name)(),), task.vocab_size)).train()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    autocast: Any = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    found = measure(
        model, task, 33, count=10, train_length=8, batch_size=4, device=torch.device("cpu"), autocast=autocast
    )
    assert found is not None
    assert model.training
    examples = draw_examples(task, 10, 33)
    with torch.no_grad():
        logits, _ = model.eval()(torch.from_numpy(examples.tokens))
    right = (logits.argmax(-1).numpy() == examples.targets) & examples.mask
    assert found.accuracy == pytest.approx(right.sum() / examples.mask.sum())
    assert found.beyond == pytest.approx(right[:, 8:].sum() / examples.mask[:, 8:].sum())
    assert found.whole == (right == examples.mask).all(1).mean()
    assert found.chance == task.chance(33)
    mask = torch.from_numpy(examples.mask)
    nats = next_token_loss(logits, torch.from_numpy(examples.targets).where(mask, IGNORED))
    assert found.nats == pytest.approx(nats.item(), rel=1e-4)


def test_a_run_that_goes_on_has_the_losses_of_one_in_one_piece(config: TaskConfig, tmp_path: Path) -> None:
    assert start(replace(config, steps=10, out=tmp_path / "whole")) == 0
    assert start(config) == 0
    saved, model = open_run(tmp_path / "run").read_config()
    assert isinstance(saved, TaskConfig)
    assert saved == replace(config, out=tmp_path / "run")
    assert resume_run(replace(saved, resume=config.out, steps=10), model.mixers, Console(quiet=True)) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    rows = [row for row in RunFolder(tmp_path / "run").read_metrics() if "accuracy_8" in row]
    assert [(row["step"], len(row)) for row in rows] == [(3, 3), (6, 5), (9, 3), (10, 5)]


def test_parts_of_a_batch_do_not_change_the_step(config: TaskConfig, tmp_path: Path) -> None:
    for task in ("copying", "listops"):
        start(replace(config, task=task, out=tmp_path / f"{task}-whole"))
        start(replace(config, task=task, out=tmp_path / f"{task}-parts", grad_accum=4))
        whole, parts = (losses(tmp_path / f"{task}-{name}") for name in ("whole", "parts"))
        assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-4)


def test_sizes_fit_a_task_if_nobody_gives_any() -> None:
    config = TaskConfig(task="s5")
    assert (config.steps, config.layers, config.param_count, config.vocab_size) == (2000, 2, 200_000, 240)
    assert TaskConfig(task="s5", params="1m", dim=64).layers is None
    assert TaskConfig(task="s5", time_limit="5s").steps is None
    assert TaskConfig(task="s5", seq_len=10, eval_multiples=(4, 1, 2)).lengths == (10, 20, 40)


BAD_INPUT = {
    "an unknown task": (["parrity"], "TASK 'parrity' is unknown: did you mean parity"),
    "a length too short": (["anbncn", "--train-length", 5], "--train-length 5 is out of range for task anbncn: give a"),
    "no length": (["parity", "--train-length", 0], "--train-length 0 is out of range"),
    "a length too long": (["parity", "--train-length", 2_000_000], "--train-length 2000000 is out of range for task"),
    "no multiples": (["parity", "--eval-multiples"], "--eval-multiples is empty: give whole numbers"),
    "far too long": (
        ["parity", "--eval-multiples", 2, 1000000],
        "--eval-multiples 1000000 of --train-length 40: a length of 40000000 is out of range for task parity",
    ),
    "no multiple": (["parity", "--eval-multiples", 0, 2], "--eval-multiples 0 2 is out of range: give whole numbers"),
    "no examples": (["parity", "--eval-examples", 0], "--eval-examples 0 is out of range"),
    "no batch": (["parity", "--batch-size", 0], "--batch-size 0 is out of range"),
    "negative workers": (["parity", "--workers", -1], "--workers -1 is out of range"),
    "an unknown model": (["parity", "--model", "e77"], "'e77' is unknown"),
    "a wrong option": (["parity", "--gate", "hx", "--expansion", -1], "--expansion -1.0 is out of range"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_a_mistake_is_one_clear_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, message = BAD_INPUT[name]
    assert command(*argv, "--steps", 1, "--device", "cpu") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_a_task_is_no_text(config: TaskConfig, capsys: pytest.CaptureFixture[str]) -> None:
    start(config)
    assert main(["generate", str(config.out)]) == 2
    assert "learned a task, not a language" in capsys.readouterr().err
    assert main(["train", "--resume", str(config.out), "--steps", "8", "mod_3"]) == 2
    assert "--task cannot change when a run goes on" in capsys.readouterr().err
    assert main(["train", "--resume", str(config.out), "--steps", "8"]) == 0


def test_tasks_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["tasks"]) == 0
    assert "selective_copying" in (told := capsys.readouterr().out)
    assert "0.125" in told
    assert main(["tasks", "copying", "--length", "5", "--seed", "1"]) == 0
    assert "Of length 5, where chance is 0.1250" in capsys.readouterr().out
    for argv, message in (
        (["copying", "--length", "2"], "--length 2 is out of range for task copying"),
        (["--length", "0"], "--length 0 is out of range"),
        (["kopying"], "did you mean copying"),
    ):
        assert main(["tasks", *argv]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["e1", "transformer"])
def test_a_captured_run_learns_on_a_gpu(config: TaskConfig, name: str) -> None:
    config = replace(config, device="cuda", dim=64, depth=2, seq_len=16, batch_size=64, steps=400, lr=3e-3, graph="on")
    trainer = Trainer(config, ModelConfig(64, 2, (mixer_config(name)(),), config.vocab_size), Console(quiet=True))
    assert trainer.graph is not None
    assert start(config, (mixer_config(name)(),)) == 0
    assert config.out is not None
    summary = json.loads((config.out / "summary.json").read_text())
    assert json.loads((config.out / "env.json").read_text())[0]["captured"]
    if name == "e1":
        assert summary["accuracies"][0]["accuracy"] > 0.97

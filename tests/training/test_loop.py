"""Whole runs, small."""

import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from elman.data.bytes import open_bytes
from elman.errors import TrainingError, UsageError
from elman.evaluation import heldout
from elman.generation import generate
from elman.mixers import MixerConfig, mixer_config
from elman.text import readable
from elman.training import loop
from elman.training.checkpoint import load_checkpoint, save_checkpoint
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.optim import learning_rate
from elman.training.run import RunFolder, load_model, newest_checkpoint, open_run
from elman.training.start import resume_run, start_run
from tests.training.test_optim import OPTIMIZERS, needs_schedulefree

E1 = (mixer_config("e1")(),)
# Its power iteration's vector must be saved too.
CAPPED = (mixer_config("e1")(constraint="spectral_norm"),)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(
        b"".join(b"the quick brown fox %d jumps over the lazy dog %d\n\x1e" % (i, i * i) for i in range(800))
    )
    return path


@pytest.fixture
def config(tmp_path: Path, text: Path) -> TrainConfig:
    return TrainConfig(
        data=text, out=tmp_path / "run", dim=16, depth=2, seq_len=32, batch_size=8, steps=12, warmup=2, lr=1e-2,
        device="cpu", eval_every=5, save_every=4, eval_bytes="500",
    )  # fmt: skip


def start(config: TrainConfig, mixers: tuple[MixerConfig, ...] = E1) -> tuple[int, str]:
    output = io.StringIO()
    return start_run(config, mixers, Console(file=output, width=100)), output.getvalue()


def resume(config: TrainConfig, **changes: Any) -> tuple[int, str]:
    saved, model = open_run(config.out).read_config()  # type: ignore[arg-type]
    output = io.StringIO()
    code = resume_run(replace(saved, resume=config.out, **changes), model.mixers, Console(file=output, width=100))
    return code, output.getvalue()


def losses(path: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in RunFolder(path).read_metrics() if "loss" in row}


def test_a_run_leaves_a_whole_folder(config: TrainConfig) -> None:
    code, output = start(config)
    assert code == 0
    out = config.out
    assert out is not None
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["tokens"] == 12 * 8 * 32
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["train_seconds"])
    assert summary["last_100_loss"] == pytest.approx(sum(losses(out).values()) / 12)
    assert summary["heldout"]["bits_per_byte"] == pytest.approx(
        summary["heldout"]["nats_per_byte"] / 0.693147, rel=1e-4
    )
    rows = RunFolder(out).read_metrics()
    assert [row["step"] for row in rows if "heldout_loss" in row] == [5, 10, 12]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    (session,) = json.loads((out / "env.json").read_text())
    assert session["backends"] == ["reference", "reference"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_text()) > 100
    assert f"{summary['heldout']['nats_per_byte']:.4f}" in output
    assert str(out) in output.splitlines()[-2]


def test_training_learns(config: TrainConfig) -> None:
    start(replace(config, steps=150, eval_every=0, save_every=0))
    history = losses(config.out)  # type: ignore[arg-type]
    assert history[1] > 4.5
    assert history[150] < 1.5


def test_the_same_seed_gives_the_same_losses(config: TrainConfig, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        start(replace(config, out=tmp_path / name, seed=seed))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_gradient_accumulation_does_not_change_the_step(config: TrainConfig, tmp_path: Path) -> None:
    start(replace(config, out=tmp_path / "whole"))
    start(replace(config, out=tmp_path / "parts", grad_accum=4))
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-4)


@pytest.mark.parametrize(
    ("mixers", "stop_at", "optimizer", "precision"),
    [
        (E1, 8, "adamw", "fp32"),
        (E1, 9, "adamw", "fp32"),
        pytest.param(CAPPED, 9, "schedulefree", "fp32", marks=needs_schedulefree),
        (CAPPED, 9, "muon", "fp32"),
        (E1, 9, "adamw", "bf16"),
        (E1, 9, "adamw", "fp16"),
        pytest.param(E1, 9, "schedulefree", "fp16", marks=needs_schedulefree),
        (E1, 9, "muon", "fp16"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mixers: tuple[MixerConfig, ...],
    stop_at: int,
    optimizer: Any,
    precision: Any,
) -> None:
    """It evaluates at step 5, saves at step 8, and is resumed from there or later."""
    if precision == "fp16":
        # So large a scale overflows at first, and grows again within the run.
        scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40, growth_interval=2)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        config = replace(config, steps=40, max_skipped=40)
        stop_at += 23
    config = replace(config, optimizer=optimizer, precision=precision)
    start(replace(config, out=tmp_path / "whole"), mixers)
    train_step = Trainer._train_step

    def step_then_signal(trainer: Trainer) -> Any:
        result = train_step(trainer)
        if trainer.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step_then_signal)
        code, output = start(config, mixers)
    assert code == 130
    assert f"stopped at step {stop_at}" in output
    assert f"elman train --resume {config.out}" in output
    code, output = resume(config)
    assert code == 0
    assert f"going on from step {stop_at}" in output
    assert losses(config.out) == losses(tmp_path / "whole")  # type: ignore[arg-type]
    assert len(RunFolder(config.out).read_json("env.json")) == 2  # type: ignore[arg-type]
    run, whole = RunFolder(config.out), RunFolder(tmp_path / "whole")  # type: ignore[arg-type]
    keys = ("skipped_steps", "heldout", "last_100_loss")
    summaries = [[folder.read_json("summary.json")[key] for key in keys] for folder in (run, whole)]
    assert summaries[0] == summaries[1]
    assert (summaries[0][0] > 0) == (precision == "fp16")


def test_what_follows_the_weights_follows_every_step(config: TrainConfig) -> None:
    start(replace(config, steps=40), CAPPED)
    assert config.out is not None
    for layer in load_model(config.out).layers:
        weight = layer.mixer.recurrence.weight_h
        assert torch.linalg.matrix_norm(weight.unscaled(), 2) > 1.2
        assert torch.linalg.matrix_norm(weight(), 2) < 1.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_after_the_last_save_are_done_again(config: TrainConfig, tmp_path: Path, optimizer: Any) -> None:
    """As after kill -9: metrics ahead of the checkpoint, their last line cut short."""
    config = replace(config, optimizer=optimizer)
    start(replace(config, out=tmp_path / "whole"))
    start(config)
    assert config.out is not None
    for path in (config.out / "checkpoints" / "step-00000012").iterdir():
        path.unlink()
    (config.out / "checkpoints" / "step-00000012").rmdir()
    (config.out / "summary.json").unlink()
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert resume(config)[0] == 0
    assert losses(config.out) == losses(tmp_path / "whole")


def damage(checkpoint: Path, name: str = "model.safetensors") -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(config: TrainConfig, tmp_path: Path) -> None:
    start(replace(config, out=tmp_path / "whole"))
    start(config)
    assert config.out is not None
    newest = config.out / "checkpoints" / "step-00000012"
    damage(newest)
    with pytest.warns(UserWarning, match=r"step-00000012 is damaged: model.safetensors .*; going by step-00000008"):
        model = load_model(config.out)
    before = load_checkpoint(config.out / "checkpoints" / "step-00000008").model
    assert torch.equal(model.embedding.weight, before["embedding.weight"])
    assert newest.exists()  # who only reads changes nothing
    code, output = resume(config)
    assert code == 0
    assert "step-00000012 is damaged: model.safetensors was cut short or changed; going by step-00000008" in output
    assert "going on from step 8" in output
    assert losses(config.out) == losses(tmp_path / "whole")
    names = [path.name for path in sorted((config.out / "checkpoints").iterdir())]
    assert names == ["damaged-step-00000012", "step-00000008", "step-00000012"]
    assert load_checkpoint(newest).step == 12


def test_without_a_whole_checkpoint_nothing_is_overwritten(config: TrainConfig) -> None:
    start(config)
    assert config.out is not None
    for path in (config.out / "checkpoints").iterdir():
        damage(path, "trainer.pt")
    before = sorted((path, path.stat().st_mtime_ns) for path in (config.out / "checkpoints").rglob("*"))
    with pytest.raises(UsageError, match=r"step-00000012 is damaged: trainer.pt .*no whole one before it"):
        resume(config, steps=20)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (config.out / "checkpoints").rglob("*"))


def test_a_finished_run_goes_on_only_with_more_steps(config: TrainConfig) -> None:
    start(config)
    with pytest.raises(UsageError, match=r"has reached its end \(step 12, \d+s\): give more --steps"):
        resume(config)
    assert resume(config, steps=15)[0] == 0
    assert max(losses(config.out)) == 15  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"--lr cannot change when a run goes on"):
        resume(config, lr=0.5)


def test_a_changed_data_file_is_refused_on_resume(config: TrainConfig) -> None:
    start(config)
    with config.data.open("ab") as file:  # type: ignore[union-attr]
        file.write(b"more\x1e")
    with pytest.raises(UsageError, match=r"--data .* is not the file that the run began with"):
        resume(config, steps=20)


def test_data_may_move_but_not_change(config: TrainConfig, tmp_path: Path) -> None:
    start(config)
    moved = config.data.rename(tmp_path / "moved")  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="no such file"):
        resume(config, steps=20)
    assert resume(config, steps=20, data=moved)[0] == 0
    content = bytearray(moved.read_bytes())
    content[5] ^= 1
    moved.write_bytes(content)
    with pytest.raises(UsageError, match="is not the file that the run began with"):
        resume(config, steps=30, data=moved)


def test_a_new_end_replaces_the_old_one(config: TrainConfig) -> None:
    start(replace(config, steps=None, time_limit="0.3s"))
    done = max(losses(config.out))  # type: ignore[arg-type]
    assert resume(config, steps=done + 3)[0] == 0
    assert max(losses(config.out)) == done + 3  # type: ignore[arg-type]


def test_a_run_without_a_checkpoint_starts_over_on_resume(config: TrainConfig, tmp_path: Path) -> None:
    """As after kill -9 before the first save."""
    start(replace(config, out=tmp_path / "whole"))
    start(config)
    shutil.rmtree(config.out / "checkpoints")  # type: ignore[operator]
    (config.out / "summary.json").unlink()  # type: ignore[operator]
    assert resume(config)[0] == 0
    assert losses(config.out) == losses(tmp_path / "whole")  # type: ignore[arg-type]


def test_a_run_cut_short_while_finishing_can_be_finished(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "plot_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(config)
    assert not (config.out / "summary.json").exists()  # type: ignore[operator]
    assert resume(config)[0] == 0
    assert (config.out / "loss.png").exists()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["metrics.jsonl", "env.json", "summary.json", "config.json"])
@pytest.mark.parametrize("content", [b"\xff\x00", b"7", b'{"step": "x"}\n', b"[" * 100000])
def test_damaged_run_files_never_end_in_a_traceback(config: TrainConfig, name: str, content: bytes) -> None:
    start(config)
    (config.out / name).write_bytes(content)  # type: ignore[operator]
    try:
        code, message = resume(config, steps=14)
    except UsageError as error:
        code, message = 0, str(error)
    assert code == 0
    assert name in message or "14 steps" in message


def spoil(monkeypatch: pytest.MonkeyPatch, where: str, steps: range) -> None:
    """Make the loss or one gradient of these steps infinite or no number."""
    accumulate = Trainer._accumulate_gradients

    def poison(trainer: Trainer) -> torch.Tensor:
        loss = accumulate(trainer)
        if trainer.step + 1 in steps:
            loss = loss * torch.nan if where == "loss" else loss
            gradient = next(trainer.model.parameters()).grad
            assert gradient is not None
            gradient[0, 0] = torch.nan if where == "loss" else torch.inf
        return loss

    monkeypatch.setattr(Trainer, "_accumulate_gradients", poison)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, where: str, optimizer: Any
) -> None:
    spoil(monkeypatch, where, range(5, 9))
    code, output = start(replace(config, steps=120, max_skipped=5, optimizer=optimizer))
    assert code == 0
    rows = [row for row in RunFolder(config.out).read_metrics() if "lr" in row]  # type: ignore[arg-type]
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {5: 1, 6: 2, 7: 3, 8: 4}
    assert [row["step"] for row in rows if "grad_norm" not in row] == [5, 6, 7, 8]
    assert [row["step"] for row in rows if "loss" not in row] == ([5, 6, 7, 8] if where == "loss" else [])
    assert "step 7 is skipped: its loss is" in output
    assert re.search(r"steps skipped +│ +4 ", output)
    assert RunFolder(config.out).read_json("summary.json")["skipped_steps"] == 4  # type: ignore[arg-type]
    assert rows[-1]["loss"] < 2.5


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_too_many_in_a_row_stop_the_run_and_its_last_checkpoint_is_named(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    spoil(monkeypatch, where, range(7, 13))
    message = r"step 9 is skipped: its loss is .*(nan|inf).*the last 3 .*lower --lr.*checkpoint is .*step-00000008"
    with pytest.raises(TrainingError, match=message):
        start(replace(config, max_skipped=3))
    assert all(tensor.isfinite().all() for tensor in load_model(config.out).state_dict().values())  # type: ignore[arg-type]
    # They are counted on over a resume: the second in a row was the one that was saved.
    with pytest.raises(TrainingError, match=r"step 9 is skipped.*the last 3 "):
        resume(config)
    with pytest.raises(TrainingError, match=r"step 11 is skipped.*the last 5 "):
        resume(config, max_skipped=5)


def test_fp16_scales_the_loss_until_gradients_fit(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    start(replace(config, steps=150, precision="fp16", max_skipped=50, eval_every=0, save_every=0))
    rows = [row for row in RunFolder(config.out).read_metrics() if "loss" in row]  # type: ignore[arg-type]
    skipped = [row["step"] for row in rows if "skipped" in row]
    assert skipped[:15] == list(range(1, 16))
    assert len(skipped) < 35
    assert max(row["grad_norm"] for row in rows if "grad_norm" in row) < 100  # of the loss, not of what was scaled
    assert rows[-1]["loss"] < 1.7


def test_the_optimiser_sees_the_rate_and_the_clipped_gradient(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    step = torch.optim.AdamW.step

    def watch(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        seen.append(({group["lr"] for group in optimizer.param_groups}, norm))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    config = replace(config, grad_clip=0.01)
    start(config)
    assert [rates for rates, _ in seen] == [{learning_rate(config, i, i / 12)} for i in range(12)]
    assert [norm for _, norm in seen] == pytest.approx([0.01] * 12, rel=1e-3)
    rows = RunFolder(config.out).read_metrics()  # type: ignore[arg-type]
    assert all(row["grad_norm"] > 0.02 for row in rows if "grad_norm" in row)


def pretend_to_compile(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[Any]:
    """Let ``torch.compile`` give its function back, or fail at the first call of what it gives; returns its calls."""
    calls = []

    def compile_(function: Any, **options: Any) -> Any:
        def fail(*arguments: Any) -> Any:
            raise error  # type: ignore[misc]

        calls.append(function)
        return function if error is None else fail

    monkeypatch.setattr(torch, "compile", compile_)
    return calls


@pytest.mark.parametrize("mixers", [E1, CAPPED])
def test_compiling_leaves_no_trace_but_its_time(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixers: tuple[MixerConfig, ...]
) -> None:
    start(replace(config, out=tmp_path / "plain", grad_accum=2), mixers)
    calls = pretend_to_compile(monkeypatch)
    start(replace(config, compile="on", grad_accum=2), mixers)
    assert len(calls) == 2  # layers and loss
    assert losses(config.out) == losses(tmp_path / "plain")  # type: ignore[arg-type]
    for out, compiled, backend in ((config.out, True, "loop"), (tmp_path / "plain", False, "reference")):
        run = RunFolder(out)  # type: ignore[arg-type]
        summary, (session,) = run.read_json("summary.json"), run.read_json("env.json")
        assert summary["compiled"] == session["compiled"] == compiled
        assert (summary["start_up_seconds"] > 1e-3) == compiled
        assert session["backends"] == [backend] * 2


def test_without_a_compiler_auto_goes_on_plain_and_on_refuses(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(replace(config, out=tmp_path / "plain"))
    pretend_to_compile(monkeypatch, RuntimeError("no C compiler found\nset CC"))
    with pytest.raises(UsageError, match=r"--compile on: .*\(RuntimeError: no C compiler found\); give --compile off"):
        start(replace(config, compile="on"))
    assert not config.out.exists()  # type: ignore[union-attr]
    monkeypatch.setattr(Trainer, "will_compile", True)
    code, output = start(config)
    assert code == 0
    assert output.count("not compiled, so slower: torch.compile fails here (RuntimeError: no C compiler found)") == 1
    assert losses(config.out) == losses(tmp_path / "plain")  # type: ignore[arg-type]
    assert RunFolder(config.out).read_json("summary.json")["compiled"] is False  # type: ignore[arg-type]


def test_a_cpu_compiles_only_when_asked(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend_to_compile(monkeypatch)
    start(config)
    assert not calls


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_training_on_a_cpu(config: TrainConfig, tmp_path: Path) -> None:
    start(replace(config, out=tmp_path / "plain"))
    _, output = start(replace(config, compile="on"))
    assert "compiling, beside that" in output
    compiled, plain = losses(config.out), losses(tmp_path / "plain")  # type: ignore[arg-type]
    assert list(compiled.values()) == pytest.approx(list(plain.values()), rel=1e-4)


def test_precision_is_the_one_asked_for(config: TrainConfig, tmp_path: Path) -> None:
    found: dict[Any, dict[int, float]] = {}
    for precision in ("fp32", "bf16", "fp16"):
        start(replace(config, out=tmp_path / precision, precision=precision))
        found[precision] = losses(tmp_path / precision)
        assert RunFolder(tmp_path / precision).read_json("env.json")[0]["precision"] == precision
    exact = list(found["fp32"].values())
    errors = {
        precision: sum(abs(a - b) for a, b in zip(found[precision].values(), exact, strict=True))
        for precision in ("bf16", "fp16")
    }
    assert 0 < errors["fp16"] < errors["bf16"] < 0.02 * sum(exact)


@pytest.mark.parametrize("optimizer", OPTIMIZERS[:2])
def test_heldout_loss_is_that_of_every_heldout_window_alone(config: TrainConfig, optimizer: Any) -> None:
    """By the weights that are saved."""
    start(replace(config, eval_bytes="1m", optimizer=optimizer))
    model = load_model(config.out)  # type: ignore[arg-type]
    heldout = open_bytes(config.data, config.heldout).heldout  # type: ignore[arg-type]
    total, count = 0.0, 0
    for begin in range(0, len(heldout) - config.seq_len, config.seq_len):
        window = torch.from_numpy(heldout[begin : begin + config.seq_len + 1].copy())[None].long()
        logits, _ = model(window[:, :-1])
        total += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
        count += config.seq_len
    reported = RunFolder(config.out).read_json("summary.json")["heldout"]  # type: ignore[arg-type]
    assert reported["bytes"] == count
    assert reported["nats_per_byte"] == pytest.approx(total / count, rel=1e-5)
    sample = bytes(generate(model, b"", 300, seed=config.seed)).decode("utf-8", "replace")
    assert (config.out / "sample.txt").read_text() == readable(sample)  # type: ignore[operator]


@pytest.mark.parametrize("optimizer", OPTIMIZERS[1:])
def test_the_other_optimisers_learn_too(config: TrainConfig, optimizer: Any) -> None:
    _, output = start(replace(config, steps=150, eval_every=0, save_every=0, optimizer=optimizer))
    assert losses(config.out)[150] < 1.7  # type: ignore[arg-type]
    assert f"; cpu, {optimizer}, fp32" in output
    assert RunFolder(config.out).read_json("summary.json")["heldout"]["nats_per_byte"] < 1.7  # type: ignore[arg-type]


def test_running_out_of_memory_tells_what_to_lower(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_train_step", lambda trainer: torch.empty(2**60))
    with pytest.raises(
        TrainingError, match=r"out of memory at step 0 .* optimiser take \d.*--batch-size.*--grad-accum"
    ):
        start(config)


def test_time_limit_ends_the_run(config: TrainConfig) -> None:
    assert start(replace(config, steps=None, time_limit="0.5s"))[0] == 0
    seconds = RunFolder(config.out).read_json("summary.json")["train_seconds"]  # type: ignore[arg-type]
    assert 0.5 <= seconds < 5


def test_a_run_never_overwrites_another(config: TrainConfig, tmp_path: Path) -> None:
    start(config)
    before = sorted((path, path.stat().st_mtime_ns) for path in config.out.rglob("*"))  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"holds another run and is left as it is.*--resume"):
        start(config)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in config.out.rglob("*"))  # type: ignore[union-attr]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not empty"):
        start(replace(config, out=tmp_path / "full"))
    with pytest.raises(UsageError, match="is a file"):
        start(replace(config, out=tmp_path / "full" / "thesis.tex"))


def test_two_processes_cannot_write_to_one_run(config: TrainConfig) -> None:
    start(config)
    with open_run(config.out).lock(), pytest.raises(UsageError, match="being written by another process"):  # type: ignore[arg-type]
        resume(config, steps=20)


def test_another_models_checkpoint_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    start(config)
    start(replace(config, out=tmp_path / "wide", dim=24))
    (config.out / "config.json").write_text((tmp_path / "wide" / "config.json").read_text())  # type: ignore[operator]
    with pytest.raises(
        UsageError, match=r"belongs to another model: .*\(256, 16\) but config.json asks for \(256, 24\)"
    ):
        load_model(config.out)  # type: ignore[arg-type]


def test_another_versions_checkpoint_is_refused_in_words(config: TrainConfig) -> None:
    start(config)
    assert config.out is not None
    newest = config.out / "checkpoints" / "step-00000012"
    old = load_checkpoint(newest)
    assert old.trainer is not None
    del old.trainer["scaler"]
    shutil.rmtree(newest)
    save_checkpoint(newest.parent, old)
    with pytest.raises(
        UsageError, match=r"step-00000012 was written by another version of elman \(it has no scaler\): "
    ):
        resume(config, steps=20)
    assert load_model(config.out) is not None


def test_generation_is_repeatable_and_carries_state(config: TrainConfig) -> None:
    start(replace(config, steps=60))
    model = load_model(config.out)  # type: ignore[arg-type]
    first = bytes(generate(model, b"the ", 40, seed=1))
    assert first == bytes(generate(model, b"the ", 40, seed=1)) != bytes(generate(model, b"the ", 40, seed=2))
    greedy = bytes(generate(model, b"the ", 20, temperature=0))
    # One byte at a time through the state is what the whole text in one piece predicts.
    logits, _ = model(torch.tensor([list(b"the " + greedy)], dtype=torch.uint8))
    assert bytes(logits[0, 3:-1].argmax(-1).tolist()) == greedy
    assert bytes(generate(model, b"the ", 20, top_p=1e-9, temperature=5.0)) == greedy
    assert list(generate(model, b"", 0)) == []
    assert list(generate(model, b"", 20, temperature=0)) == list(generate(model, b"\x1e", 20, temperature=0))
    assert bytes(generate(model, b"the ", 20, temperature=1e-40)) == greedy


def test_sampling_follows_the_models_probabilities(config: TrainConfig) -> None:
    start(replace(config, steps=60))
    model = load_model(config.out)  # type: ignore[arg-type]
    logits, _ = model(torch.tensor([list(b"the quick b")]))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.5)):
        expected = (logits[0, -1].double() / temperature).softmax(-1)
        order = expected.argsort(descending=True)
        kept = order[: int((expected[order].cumsum(-1) < top_p).sum()) + 1] if top_p < 1 else order
        expected = torch.zeros_like(expected).index_copy(0, kept, expected[kept])
        expected /= expected.sum()
        drawn = [
            next(generate(model, b"the quick b", 1, temperature=temperature, top_p=top_p, seed=s)) for s in range(400)
        ]
        found = torch.bincount(torch.tensor(drawn), minlength=256) / len(drawn)
        assert set(drawn) <= set(kept.tolist())
        # The total variation distance of 400 draws is about sqrt(k / 400) / 2 for k likely bytes.
        assert (found - expected).abs().sum() / 2 < 0.25


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("during", ["evaluation", "saving", "the last evaluation"])
def test_a_signal_in_evaluation_or_saving_ends_in_a_whole_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str, number: int
) -> None:
    start(replace(config, out=tmp_path / "whole"))
    module, name = (torch, "save") if during == "saving" else (heldout, "gather")
    at = {"evaluation": 5, "saving": 4, "the last evaluation": 12}[during]
    function, fetch = getattr(module, name), Trainer._fetch_losses
    step = 0

    def watch(trainer: Trainer, display: Any) -> None:
        nonlocal step
        step = trainer.step
        fetch(trainer, display)

    def signalled(*arguments: Any, **options: Any) -> Any:
        if step == at:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_fetch_losses", watch)
        patch.setattr(module, name, signalled)
        if during != "saving":
            # More than one batch, between which it listens.
            config = replace(config, batch_size=8, eval_bytes="1m")
        code, output = start(config)
    assert code == 130
    assert f"stopped at step {at}, saved in" in output
    assert newest_checkpoint(RunFolder(config.out)).name == f"step-{at:08d}"  # type: ignore[arg-type, union-attr]
    assert resume(config)[0] == 0
    assert losses(config.out) == losses(tmp_path / "whole")  # type: ignore[arg-type]


def test_sigterm_to_a_real_process_ends_in_a_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "elman", "train", "--data", config.data, "--out", config.out, "--dim", "16",
        "--depth", "2", "--seq-len", "32", "--batch-size", "8", "--steps", "1000000",
        "--eval-bytes", "500", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = config.out / "metrics.jsonl"  # type: ignore[operator]
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "go on with: elman train --resume" in output
    assert load_model(config.out) is not None  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_run_on_the_gpu_learns_in_bf16_compiled_and_resumes_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, device="cuda", steps=100, lr=1e-2, schedule="constant", save_every=60)
    assert start(replace(config, out=tmp_path / "whole"))[0] == 0
    assert start(replace(config, steps=60))[0] == 0
    assert resume(config, steps=100)[0] == 0
    whole = losses(tmp_path / "whole")
    assert losses(config.out) == whole  # type: ignore[arg-type]
    assert whole[100] < 0.6 * whole[1]
    session = RunFolder(config.out).read_json("env.json")[0]  # type: ignore[arg-type]
    assert session["precision"] == "bf16"
    assert session["compiled"] is True


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_on_the_gpu_waits_for_nothing_skips_and_resumes_bit_for_bit(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any, precision: Any
) -> None:
    """Its first steps are not watched: they make what later ones use, and fp16 finds its scale."""
    spoil(monkeypatch, "loss", range(33, 36))
    step = Trainer._train_step

    def watched(trainer: Trainer) -> Any:
        torch.cuda.set_sync_debug_mode("error" if trainer.step - trainer._first_step >= 5 else "default")
        try:
            return step(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_train_step", watched)
    config = replace(
        config, device="cuda", steps=80, schedule="constant", save_every=50, optimizer=optimizer, precision=precision
    )
    assert start(replace(config, out=tmp_path / "whole"))[0] == 0
    assert start(replace(config, steps=50))[0] == 0
    assert resume(config, steps=80)[0] == 0
    whole = losses(tmp_path / "whole")
    assert losses(config.out) == whole  # type: ignore[arg-type]
    assert whole[80] < 0.8 * whole[1]
    summaries = [RunFolder(out).read_json("summary.json") for out in (config.out, tmp_path / "whole")]  # type: ignore[arg-type]
    assert summaries[0]["heldout"] == summaries[1]["heldout"]
    assert summaries[0]["skipped_steps"] == summaries[1]["skipped_steps"] >= 3

"""Whole runs, small: what they leave, learn, compile and measure."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elman.data.bytes import open_bytes
from elman.errors import UsageError
from elman.generation import generate
from elman.mixers import MixerConfig
from elman.text import readable
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.optim import learning_rate
from elman.training.run import RunFolder, load_model
from tests.training.runs import CAPPED, E1, losses, resume, start
from tests.training.test_optim import OPTIMIZERS


@pytest.mark.whole_endings
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


def test_what_follows_the_weights_follows_every_step(config: TrainConfig) -> None:
    start(replace(config, steps=40), CAPPED)
    assert config.out is not None
    for layer in load_model(config.out).layers:
        weight = layer.mixer.recurrence.weight_h
        assert torch.linalg.matrix_norm(weight.unscaled(), 2) > 1.2
        assert torch.linalg.matrix_norm(weight(), 2) < 1.0


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
    # In parts as large as those of two ranks: what was compiled for the ones, the others find in PyTorch's cache.
    config = replace(config, grad_accum=2)
    start(replace(config, out=tmp_path / "plain"))
    _, output = start(replace(config, compile="on"))
    assert "compiling, beside that" in output
    compiled, plain = losses(config.out), losses(tmp_path / "plain")  # type: ignore[arg-type]
    assert list(compiled.values()) == pytest.approx(list(plain.values()), rel=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_rows_of_compiled_products_are_not_filled_up(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would be for a GPU, had the compiler been left to it."""
    import torch._inductor.ir

    torch._dynamo.reset()  # or it may have compiled this before
    asked, should_pad = [], torch._inductor.ir.Layout.should_pad_strides
    monkeypatch.setattr(
        torch._inductor.ir.Layout,
        "should_pad_strides",
        lambda layout: asked.append(should_pad(layout)) or asked[-1],  # type: ignore[func-returns-value]
    )
    # Graphs anew; the libraries that come out are those of the test above. Monkeypatch would leave no options behind.
    options = torch._inductor.config.patch(disable_padding_cpu=False, fx_graph_cache=False)
    with options, torch._functorch.config.patch(enable_autograd_cache=False):
        start(replace(config, steps=1, grad_accum=2, compile="on"))
    assert asked
    assert not any(asked)


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


@pytest.mark.whole_endings
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


@pytest.mark.gpu
def test_a_run_on_the_gpu_learns_in_bf16_compiled_and_resumes_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, device="cuda", steps=100, lr=1e-2, schedule="constant", save_every=60)
    assert start(replace(config, out=tmp_path / "whole"))[0] == 0
    assert start(replace(config, steps=60))[0] == 0
    assert resume(config, steps=100)[0] == 0
    whole = losses(tmp_path / "whole")
    assert losses(config.out) == whole
    assert whole[100] < 0.6 * whole[1]
    session = RunFolder(config.out).read_json("env.json")[0]  # type: ignore[arg-type]
    assert session["precision"] == "bf16"
    assert session["compiled"] is True

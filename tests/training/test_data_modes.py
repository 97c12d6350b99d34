"""Runs on documents and on streams: what they read, what state they carry, and that they resume exactly."""

import itertools
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from elman.data.bytes import open_bytes
from elman.errors import UsageError
from elman.generation import generate
from elman.mixers import MixerConfig, mixer_config
from elman.model import ModelConfig, next_token_loss
from elman.training.carry import Carry
from elman.training.checkpoint import load_checkpoint
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.run import RunFolder, load_model, load_text, newest_checkpoint, open_run
from elman.training.start import resume_run, start_run
from tests.training.runs import losses

E1 = (mixer_config("e1")(conv=3),)
#: States of tuples, of several tensors and of two dtypes.
HYBRID = (mixer_config("e10")(), mixer_config("lstm")(kernels="elman"), mixer_config("mamba2")(d_state=8))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"".join(b"the fox %d jumps over %d\n\x1e" % (i, i * i) * (1 + i % 3) for i in range(600)))
    return path


@pytest.fixture
def config(tmp_path: Path, text: Path) -> TrainConfig:
    return TrainConfig(
        data=text, out=tmp_path / "run", dim=16, depth=3, seq_len=24, batch_size=8, steps=12, warmup=2, lr=1e-2,
        device="cpu", eval_every=5, save_every=4, eval_bytes="500", sampling="tbptt",
    )  # fmt: skip


def start(config: TrainConfig, mixers: tuple[MixerConfig, ...] = E1) -> int:
    return start_run(config, mixers, Console(quiet=True))


def trainer_of(config: TrainConfig, mixers: tuple[MixerConfig, ...] = E1) -> Trainer:
    return Trainer(config, ModelConfig(16, 3, mixers), Console(quiet=True))


@pytest.mark.parametrize("mixers", [E1, HYBRID])
@pytest.mark.parametrize("grad_accum", [1, 4])
def test_streams_give_the_losses_of_their_documents_alone(
    config: TrainConfig, mixers: tuple[MixerConfig, ...], grad_accum: int
) -> None:
    trainer = trainer_of(replace(config, grad_accum=grad_accum, batch_size=4), mixers)
    steps, model = 6, trainer.model
    found = []
    for _ in range(steps):
        found.append(trainer._accumulate_gradients().item())
        trainer.step += 1
    streams = np.concatenate([trainer.sampler.batch(step).tokens[:, :-1] for step in range(steps)], axis=1)
    targets = np.concatenate([trainer.sampler.batch(step).tokens[:, 1:] for step in range(steps)], axis=1)
    by_token = torch.zeros(streams.shape, dtype=torch.float64)
    documents = 0
    for stream, target, out in zip(streams, targets, by_token, strict=True):
        cuts = [0, *(np.flatnonzero(stream == 0x1E) + 1).tolist(), len(stream)]
        for first, end in itertools.pairwise(cuts):
            if first == end:
                continue
            documents += 1
            with torch.no_grad():
                logits, _ = model(torch.tensor(stream[None, first:end].astype(np.int64)))
            out[first:end] = next_token_loss(logits, torch.tensor(target[None, first:end]), reduction="none")
    assert documents > 12
    expected = by_token.view(4, steps, -1).mean((0, 2))
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


def test_what_is_carried_has_no_history_and_is_not_spoilt_by_a_try(config: TrainConfig) -> None:
    trainer = trainer_of(replace(config, grad_accum=2), HYBRID)
    trainer._train_step()
    leaves = torch.utils._pytree.tree_leaves(trainer.carry.states)
    assert leaves
    assert all(leaf.grad_fn is None and not leaf.requires_grad and len(leaf) == 4 for leaf in leaves)
    assert all(leaf.abs().sum() > 0 for leaf in leaves)
    before = [leaf.clone() for leaf in leaves]
    trainer._try_step()
    after = torch.utils._pytree.tree_leaves(trainer.carry.states)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("sampling", ["documents", "tbptt"])
@pytest.mark.parametrize("mixers", [E1, HYBRID])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampling: Any,
    mixers: tuple[MixerConfig, ...],
) -> None:
    config = replace(config, sampling=sampling, grad_accum=2)
    start(replace(config, out=tmp_path / "whole"), mixers)
    train_step = Trainer._train_step

    def step_then_signal(trainer: Trainer) -> Any:
        result = train_step(trainer)
        if trainer.step == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step_then_signal)
        assert start(config, mixers) == 130
    assert config.out is not None
    saved, model = open_run(config.out).read_config()
    assert resume_run(replace(saved, resume=config.out), model.mixers, Console(quiet=True)) == 0
    assert losses(config.out) == losses(tmp_path / "whole")
    if sampling == "tbptt":
        # The resume proves nothing unless the state matters.
        path = newest_checkpoint(RunFolder(config.out))
        assert path is not None
        trainer = trainer_of(saved, mixers)
        trainer.restore(RunFolder(config.out))
        loss = trainer._accumulate_gradients().item()
        trainer.carry.states = trainer_of(saved, mixers).carry.states
        assert trainer._accumulate_gradients().item() != loss


def test_the_saved_state_is_that_of_the_whole_batch(config: TrainConfig, tmp_path: Path) -> None:
    """So another split of the same batch can go on from it."""
    states = []
    for grad_accum in (1, 4):
        out = tmp_path / str(grad_accum)
        start(replace(config, out=out, grad_accum=grad_accum, steps=1), HYBRID)
        path = newest_checkpoint(RunFolder(out))
        assert path is not None
        checkpoint = load_checkpoint(path)
        assert checkpoint.trainer is not None
        states.append(torch.utils._pytree.tree_leaves(checkpoint.trainer["state"]))
    for whole, parts in zip(*states, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_streams_learn_more_than_windows_from_rest(config: TrainConfig, tmp_path: Path) -> None:
    for sampling in ("windows", "tbptt"):
        start(replace(config, out=tmp_path / sampling, sampling=sampling, seq_len=4, steps=150, eval_every=0))  # type: ignore[arg-type]
    windows, streams = (list(losses(tmp_path / name).values())[-50:] for name in ("windows", "tbptt"))
    assert sum(streams) < 0.97 * sum(windows)


def test_held_out_documents_are_told_apart_as_in_training(config: TrainConfig) -> None:
    start(replace(config, eval_bytes="1m", steps=30))
    assert config.out is not None
    assert config.data is not None
    model = load_model(config.out)
    heldout = open_bytes(config.data, config.heldout).heldout
    total, count = 0.0, 0
    for begin in range(0, len(heldout) - config.seq_len, config.seq_len):
        window = heldout[begin : begin + config.seq_len + 1]
        cuts = [0, *(np.flatnonzero(window[:-2] == 0x1E) + 1).tolist(), config.seq_len]
        for first, end in itertools.pairwise(cuts):
            logits, _ = model(torch.tensor(window[None, first:end].astype(np.int64)))
            targets = torch.tensor(window[None, first + 1 : end + 1].astype(np.int64))
            total += next_token_loss(logits, targets, reduction="sum").item()
        count += config.seq_len
    reported = RunFolder(config.out).read_json("summary.json")["heldout"]
    assert reported["bytes"] == reported["tokens"] == count
    assert reported["nats_per_byte"] == reported["nats_per_token"] == pytest.approx(total / count, rel=1e-5)


def test_generation_starts_documents_as_training_did(config: TrainConfig) -> None:
    start(replace(config, steps=60))
    assert config.out is not None
    model = load_model(config.out)
    vocabulary, resets = load_text(config.out)
    assert resets
    prompt = b"noise 123\x1ethe "
    apart = bytes(generate(model, prompt, 12, temperature=0, vocabulary=vocabulary, resets=True))
    assert apart == bytes(generate(model, b"the ", 12, temperature=0))
    assert 0x1E not in apart


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_training_carries_state_without_compiling_again(config: TrainConfig, tmp_path: Path) -> None:
    start(replace(config, out=tmp_path / "plain", grad_accum=2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = trainer_of(replace(config, compile="on", grad_accum=2))
    trainer.warm_up()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled
    found = [trainer._train_step()[1][0].item()]
    found += [trainer._train_step()[1][0].item() for _ in range(3)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert found == pytest.approx(list(losses(tmp_path / "plain").values())[:4], rel=1e-4)


def test_tbptt_is_short_for_the_sampling() -> None:
    assert TrainConfig(steps=1, tbptt=True).sampling == "tbptt"
    assert TrainConfig(steps=1, tbptt=True) == replace(TrainConfig(steps=1, sampling="tbptt"), lr=1e-3)
    with pytest.raises(UsageError, match="--tbptt is short for --sampling tbptt, not documents"):
        TrainConfig(steps=1, tbptt=True, sampling="documents")


def test_a_state_that_grows_cannot_be_carried(config: TrainConfig) -> None:
    with pytest.raises(UsageError, match=r"--sampling tbptt .* of transformer grows with the text: give"):
        start(config, (mixer_config("transformer")(),))
    assert config.out is not None
    assert not config.out.exists()
    assert start(replace(config, sampling="documents"), (mixer_config("transformer")(),)) == 0


def test_another_sampling_cannot_go_on_with_a_run(config: TrainConfig) -> None:
    start(config)
    assert config.out is not None
    saved, model = open_run(config.out).read_config()
    with pytest.raises(UsageError, match="--sampling cannot change when a run goes on"):
        resume_run(replace(saved, resume=config.out, sampling="windows"), model.mixers, Console(quiet=True))


def test_a_skipped_step_leaves_the_carried_state() -> None:
    state = [torch.ones(2, 3), (torch.full((2, 4), 2.0),)]
    carry = Carry(1, state)
    carry.put(0, state)
    before = list(carry.states)
    for skip in (False, True):
        carry.put(0, [torch.full((2, 3), torch.nan), (torch.zeros(2, 4),)])
        carry.undo(torch.tensor(skip), before)
        kept = carry.states[0][0]
        assert torch.equal(kept, state[0]) if skip else kept.isnan().all()

"""Two ranks on the CPU: they train, skip, stop, save and resume as one process does."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves

from elman.errors import TrainingError, UsageError
from elman.evaluation.heldout import evaluate
from elman.mixers import MixerConfig, mixer_config
from elman.model import ModelConfig
from elman.training.checkpoint import load_checkpoint
from elman.training.config import TrainConfig
from elman.training.distributed import LostRanksError, Processes, launched
from elman.training.loop import Trainer
from elman.training.run import RunFolder, load_model, newest_checkpoint
from elman.training.sharded import units
from tests.data.tiny_encoding import NAME
from tests.training.rank_work import (
    broken,
    goes_on,
    reads,
    signalled,
    signalled_in_evaluation,
    slowed,
    spoilt,
    start_tiny,
    watched,
    with_full_disk,
    without_compiler,
    without_data,
)
from tests.training.ranks import Ranks
from tests.training.runs import CAPPED, E1, losses, resume, start
from tests.training.test_optim import OPTIMIZERS, needs_schedulefree

KINDS = ("ddp", "fsdp")
# One with a rate of its own for W_h.
HYBRID = (mixer_config("e10")(recurrent_lr=0.5), mixer_config("gru")(kernels="elman"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have it: then one process that runs as many parts adds the same numbers in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return replace(config, steps=7, save_every=3)


def finish(results: list[Any]) -> list[Any]:
    """All ranks went to the end. Returns what each printed."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert {code for code, _ in results} == {0}
    return [output for _, output in results]


def both(path: Path | None) -> tuple[dict[int, float], Any]:
    """All that a run measured of the model: losses by step, and the held-out loss."""
    assert path is not None
    return losses(path), RunFolder(path).read_json("summary.json")["heldout"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sampling", "mixers"), [("windows", E1), ("documents", E1), ("tbptt", E1), ("tbptt", HYBRID)], ids=str
)
def test_two_ranks_give_the_losses_of_one_process_to_the_last_bit(
    ranks: Ranks, config: TrainConfig, tmp_path: Path, kind: Any, sampling: Any, mixers: tuple[MixerConfig, ...]
) -> None:
    """Of one that splits the batch as they do: else the rows of a product, and so its sums, may be others. And of
    shards where nothing is clipped, for their norm is summed shard by shard."""
    config = replace(config, sampling=sampling, grad_clip=0.0 if kind == "fsdp" else 0.5)
    start(replace(config, out=tmp_path / "one", grad_accum=2), mixers)
    start(replace(config, out=tmp_path / "whole"), mixers)
    outputs = finish(ranks.run(start, replace(config, parallel=kind), mixers))
    assert both(config.out) == both(tmp_path / "one")
    assert losses(config.out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert "held-out loss" in outputs[0]
    assert f"{kind} over 2 processes" in outputs[0]
    assert outputs[1] == ""
    run = RunFolder(config.out)  # type: ignore[arg-type]
    summary = run.read_json("summary.json")
    assert (summary["processes"], summary["parallel"], summary["tokens"]) == (2, kind, 7 * 8 * 32)
    assert [row["step"] for row in run.read_metrics() if "lr" in row] == list(range(1, 8))
    assert load_model(run.path) is not None


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_evaluation_whatever_the_number_of_batches(config: TrainConfig, world_size: int) -> None:
    trainer = Trainer(config, ModelConfig(16, 2, E1), Console(quiet=True))
    given: dict[str, Any] = {"batch_size": 4, "device": trainer.device, "autocast": trainer.autocast}
    parts: list[torch.Tensor] = []

    def keep(values: torch.Tensor) -> torch.Tensor:
        parts.append(values.clone())
        return values

    for rank in range(world_size):
        evaluate(trainer.model, trainer.source.heldout, rank=rank, world_size=world_size, total=keep, **given)
    whole = evaluate(trainer.model, trainer.source.heldout, **given)
    assert whole is not None
    batches = torch.stack(parts)
    assert batches.shape == (world_size, 2, 4)
    assert ((batches != 0).sum(0) == 1).all()
    nats, num_bytes = batches.sum(0).sum(1).tolist()
    assert (nats / whole.tokens, num_bytes) == (whole.nats_per_token, whole.bytes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parts_optimisers_and_spectral_norms_go_with_ranks(
    ranks: Ranks, config: TrainConfig, tmp_path: Path, kind: Any, optimizer: Any
) -> None:
    config = replace(config, optimizer=optimizer, grad_clip=0.3, steps=10)
    start(replace(config, out=tmp_path / "one", grad_accum=4), CAPPED)
    finish(ranks.run(start, replace(config, parallel=kind, grad_accum=2), CAPPED))
    (found, heldout), (wanted, one) = both(config.out), both(tmp_path / "one")
    assert found == pytest.approx(wanted, rel=1e-5)
    assert heldout["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-5)


def test_text_is_tokenised_by_each_rank_for_itself(ranks: Ranks, config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, tokenizer=NAME, workers=1, steps=4)
    start_tiny(replace(config, out=tmp_path / "one", grad_accum=2))
    finish(ranks.run(start_tiny, replace(config, parallel="ddp")))
    assert both(config.out) == both(tmp_path / "one")


def test_streams_of_tokens_go_on_by_another_number_of_ranks(ranks: Ranks, config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, tokenizer=NAME, workers=1, sampling="tbptt", schedule="constant", steps=6)
    start_tiny(replace(config, out=tmp_path / "one"))
    finish(ranks.run(start_tiny, replace(config, parallel="ddp", steps=3)))
    assert resume(config, parallel="none", steps=6)[0] == 0
    assert losses(config.out) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_one_rank_cannot_take_is_skipped_by_all(
    ranks: Ranks, config: TrainConfig, kind: Any, precision: Any
) -> None:
    """fp16 in a CPU's tests has gradients that overflow at first on every rank, beside."""
    config = replace(config, parallel=kind, precision=precision, steps=8, max_skipped=20)
    results = ranks.run(spoilt, config, range(3, 6))
    finish([(code, output) for code, output, _ in results])
    rows = [row for row in RunFolder(config.out).read_metrics() if "lr" in row]  # type: ignore[arg-type]
    skipped = [row["step"] for row in rows if "skipped" in row]
    assert set(skipped) >= {3, 4, 5}
    assert precision == "fp16" or skipped == [3, 4, 5]
    assert results[0][2] == results[1][2]
    assert all(tensor.isfinite().all() for tensor in load_model(config.out).state_dict().values())  # type: ignore[arg-type]


def test_too_many_skipped_steps_end_all_and_one_tells(ranks: Ranks, config: TrainConfig) -> None:
    error, other = ranks.run(spoilt, replace(config, parallel="ddp", max_skipped=2), range(5, 99))
    assert isinstance(error, TrainingError)
    assert re.search(r"step 6 is skipped: its loss is nan.*checkpoint is .*step-00000003", str(error))
    assert isinstance(other, SystemExit)
    assert other.code == 1


@pytest.mark.parametrize("sampling", ["windows", "tbptt"])
@pytest.mark.parametrize(("before", "after"), [("none", "ddp"), ("ddp", "none"), ("none", "fsdp"), ("fsdp", "none")])
def test_a_run_goes_on_by_another_number_of_ranks(
    ranks: Ranks, config: TrainConfig, tmp_path: Path, sampling: Any, before: Any, after: Any
) -> None:
    """What one process reads and carries as parts of a batch, two ranks do, and the other way round."""
    config = replace(config, sampling=sampling, grad_clip=0.0, schedule="constant")
    start(replace(config, out=tmp_path / "one", grad_accum=2), CAPPED)

    def go_on(kind: str, first: bool) -> None:
        given = replace(config, parallel=kind, steps=4 if first else 7)  # type: ignore[arg-type]
        step = [start, given, CAPPED] if first else [goes_on, given]
        if kind == "none":
            assert step[0](*step[1:])[0] == 0
        else:
            finish(ranks.run(*step))

    go_on(before, True)
    go_on(after, False)
    assert losses(config.out) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert max(losses(config.out)) == 7


@pytest.mark.parametrize(("before", "after"), [("none", "ddp"), ("none", "fsdp"), ("fsdp", "none")])
def test_a_new_run_starts_from_the_weights_of_other_ranks(
    ranks: Ranks, config: TrainConfig, tmp_path: Path, before: Any, after: Any
) -> None:
    config = replace(config, grad_clip=0.0)

    def train(kind: str, out: str, **changes: Any) -> None:
        given = replace(config, parallel=kind, out=tmp_path / out, **changes)  # type: ignore[arg-type]
        if kind == "none":
            assert start(replace(given, grad_accum=2))[0] == 0
        else:
            finish(ranks.run(start, given))

    train(before, "first")
    new: dict[str, Any] = {"start_from": tmp_path / "first", "dim": None, "depth": None, "steps": 2}
    train(after, "second", **new)
    train("none", "expected", **new)
    assert losses(tmp_path / "second") == pytest.approx(losses(tmp_path / "expected"), rel=1e-6)
    assert losses(tmp_path / "second")[1] < losses(tmp_path / "first")[1] - 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("schedulefree", marks=needs_schedulefree)])
def test_a_signal_to_one_rank_ends_all_in_a_whole_checkpoint_from_which_they_go_on_to_the_bit(
    ranks: Ranks, config: TrainConfig, tmp_path: Path, kind: Any, optimizer: Any
) -> None:
    config = replace(config, parallel=kind, optimizer=optimizer, sampling="tbptt")
    finish(ranks.run(start, replace(config, out=tmp_path / "whole"), CAPPED))
    for code, output in ranks.run(signalled, config, CAPPED, 1, 4):
        assert code == 130, output
    assert newest_checkpoint(RunFolder(config.out)).name == "step-00000004"  # type: ignore[arg-type, union-attr]
    outputs = finish(ranks.run(resume, config))
    assert "going on from step 4" in outputs[0]
    assert both(config.out) == both(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_in_evaluation_ends_all(ranks: Ranks, config: TrainConfig, kind: Any) -> None:
    config = replace(config, parallel=kind, eval_bytes="1m")
    for code, output in ranks.run(signalled_in_evaluation, config, 1):
        assert code == 130, output
    assert newest_checkpoint(RunFolder(config.out)).name == "step-00000005"  # type: ignore[arg-type, union-attr]


def test_ranks_go_by_one_clock(ranks: Ranks, config: TrainConfig) -> None:
    """The learning rate follows the time, of which each rank has measured another."""
    config = replace(config, parallel="ddp", steps=None, time_limit="0.5s", save_every=0, eval_every=0)
    results = ranks.run(slowed, config, 1)
    finish([(code, output) for code, output, _ in results])
    assert results[0][2] == results[1][2]


def test_an_error_on_one_rank_ends_all(ranks: Ranks, config: TrainConfig) -> None:
    lost, error = ranks.run(broken, replace(config, parallel="ddp"), 1)
    assert isinstance(error, ZeroDivisionError)
    assert isinstance(lost, LostRanksError)
    assert re.search(r"rank 0 of 2 lost the others, .*\(\w[^()]*\S\): .*unless it was killed.* by --resume", str(lost))
    assert "typically" not in str(lost)


def test_a_file_that_one_rank_does_not_see_is_told_of_by_the_main_one(ranks: Ranks, config: TrainConfig) -> None:
    error, other = ranks.run(without_data, replace(config, parallel="ddp"), 1)
    assert isinstance(error, UsageError)
    assert re.search("rank 1: --data .*: no such file", str(error))
    assert isinstance(other, SystemExit)
    assert not config.out.exists()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "grad_accum": 2}, r"--batch-size 6 .*2 of them .*--grad-accum 2.*: give a multiple of 4"),
        ({"parallel": "none"}, r"--parallel none .* 2 processes that torchrun started: give --parallel ddp or fsdp"),
    ],
)
def test_a_mistake_is_told_once(ranks: Ranks, config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    results = ranks.run(start, replace(config, **changes))
    assert isinstance(results[0], UsageError)
    assert re.search(message, str(results[0]))
    assert isinstance(results[1], SystemExit)


def test_a_single_number_cannot_be_shared(ranks: Ranks, config: TrainConfig) -> None:
    scaled = (mixer_config("e1")(constraint="scaled_orthogonal"),)
    error, _ = ranks.run(start, replace(config, parallel="fsdp"), scaled)
    assert isinstance(error, UsageError)
    assert re.search(r"--parallel fsdp cannot share .*weight_h\.s, .*: give --parallel ddp", str(error))


@pytest.mark.parametrize("kind", KINDS)
def test_without_torchrun_there_is_nothing_to_share(config: TrainConfig, kind: Any) -> None:
    with pytest.raises(UsageError, match=f"--parallel {kind} shares .*: start them by torchrun --nproc_per_node=N"):
        start(replace(config, parallel=kind))
    assert launched({}) is None
    assert launched({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Processes(3, 4, 1)


def test_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Processes(3, 4, 1, "ddp").device("auto") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="--device cuda:1 is one GPU, but torchrun started 4 processes: give --device"):
        Processes(3, 4, 1, "ddp").device("cuda:1")
    with pytest.raises(UsageError, match=r"process 2 on this machine, which has 2 GPU.*: give --nproc_per_node=2"):
        Processes(2, 4, 2, "fsdp").device("cuda")


def test_ddp_is_short_for_parallel() -> None:
    assert TrainConfig(steps=1, ddp=True).parallel == "ddp"
    with pytest.raises(UsageError, match="--ddp is short for --parallel ddp, not fsdp"):
        TrainConfig(steps=1, ddp=True, parallel="fsdp")


def test_damaged_shards_are_found_and_the_checkpoint_before_is_taken(
    ranks: Ranks, config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, parallel="fsdp")
    finish(ranks.run(start, config))
    assert config.out is not None
    newest = newest_checkpoint(RunFolder(config.out))
    assert newest is not None
    whole = load_checkpoint(newest)
    assert whole.trainer is not None
    assert whole.trainer["optimizer"]["parts"][0]["state"][0]["exp_avg"].any()
    shard = sorted(newest.glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"step-00000007 is damaged: {shard.name} .*; going by step-00000006"):
        load_model(config.out)
    outputs = finish(ranks.run(resume, config))
    assert "going by step-00000006" in outputs[0]
    assert "going on from step 6" in outputs[0]
    restored = load_checkpoint(newest)
    assert all(torch.equal(whole.model[name], restored.model[name]) for name in whole.model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("before", ["fsdp", "none"])
def test_a_rank_reads_and_holds_no_more_of_a_checkpoint_than_its_shards(
    ranks: Ranks, config: TrainConfig, before: Any, optimizer: Any
) -> None:
    """Of one process's checkpoint, files are mapped to memory: there the numbers are all that could be read."""
    config = replace(config, parallel=before, optimizer=optimizer, steps=4)
    begun = [start(config)] if before == "none" else ranks.run(start, config)
    finish([*begun, *begun][:2])
    newest = newest_checkpoint(RunFolder(config.out))  # type: ignore[arg-type]
    assert newest is not None
    results = ranks.run(reads, replace(config, parallel="fsdp", steps=5))
    finish([(code, output) for code, output, _ in results])
    found = [reading for *_, reading in results]
    assert sorted(found[0].checked + found[1].checked) == sorted(
        path.name for path in newest.iterdir() if path.name != "manifest.json"
    )
    assert [reading.surplus for reading in found] == [0, 0]
    if before == "fsdp":
        whole = load_checkpoint(newest)
        assert whole.trainer is not None
        state = whole.model, whole.trainer["optimizer"]
        numbers = sum(leaf.numel() for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.ndim)
        assert [reading.numbers for reading in found] == [numbers // 2] * 2


def test_shards_are_read_by_more_ranks_and_by_copies(ranks: Ranks, config: TrainConfig, tmp_path: Path) -> None:
    """Three have unequal shares."""
    config = replace(config, batch_size=12, grad_clip=0.0, schedule="constant", save_every=0)
    start(replace(config, out=tmp_path / "one"), HYBRID)
    finish(ranks.run(start, replace(config, parallel="fsdp", steps=2), HYBRID))
    three = Ranks(3)
    try:
        finish(three.run(goes_on, replace(config, parallel="fsdp", steps=4)))
    finally:
        three.close()
    finish(ranks.run(goes_on, replace(config, parallel="fsdp", steps=5)))
    finish(ranks.run(goes_on, replace(config, parallel="ddp", steps=6)))
    finish(ranks.run(goes_on, replace(config, parallel="fsdp", steps=7)))
    assert losses(config.out) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_each_machine_checks_all_files_and_a_checkpoint_is_not_passed_over_for_one_machine(
    ranks: Ranks, config: TrainConfig
) -> None:
    config = replace(config, parallel="fsdp", steps=4)
    finish(ranks.run(start, config))
    folder = RunFolder(config.out).checkpoints  # type: ignore[arg-type]
    there = sorted(folder.iterdir())
    names = sorted(path.name for path in there[-1].iterdir() if path.name != "manifest.json")
    config = replace(config, steps=5)
    error, other = ranks.run(reads, config, "machine{}", "trainer.pt")
    assert isinstance(error, UsageError)
    assert re.search("on machine1 .*step-00000004 is damaged: trainer.pt .*, but not on all machines", str(error))
    assert isinstance(other, SystemExit)
    assert sorted(folder.iterdir()) == there
    results = ranks.run(reads, config, "machine{}")
    finish([(code, output) for code, output, _ in results])
    assert [reading.checked for *_, reading in results] == [names, names]


def test_a_file_of_shards_that_the_sums_do_not_know_is_not_read(ranks: Ranks, config: TrainConfig) -> None:
    finish(ranks.run(start, replace(config, parallel="fsdp")))
    newest = newest_checkpoint(RunFolder(config.out))  # type: ignore[arg-type]
    assert newest is not None
    save_file({"model.norm.weight": torch.ones(16)}, newest / "more.safetensors")
    with pytest.raises(UsageError, match=r"step-00000007 is damaged: more.safetensors is none of its files"):
        load_checkpoint(newest)


@pytest.mark.parametrize(("kind", "what"), [("ddp", "trainer"), ("fsdp", "trainer"), ("fsdp", "shards")])
def test_a_checkpoint_that_cannot_be_written_is_absent_and_ends_all(
    ranks: Ranks, config: TrainConfig, kind: Any, what: str
) -> None:
    error, other = ranks.run(with_full_disk, replace(config, parallel=kind), what)
    assert isinstance(error, TrainingError)
    assert re.search("checkpoint of step 3 cannot be written to .*No space left", str(error))
    assert isinstance(other, SystemExit)
    assert list((config.out / "checkpoints").iterdir()) == []  # type: ignore[operator]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_ranks_train_as_plain_ones(ranks: Ranks, config: TrainConfig, tmp_path: Path, kind: Any) -> None:
    config = replace(config, parallel=kind)
    finish(ranks.run(start, replace(config, out=tmp_path / "plain")))
    finish(ranks.run(start, replace(config, compile="on")))
    assert RunFolder(config.out).read_json("summary.json")["compiled"] is True  # type: ignore[arg-type]
    assert losses(config.out) == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_under_torchrun_a_signal_ends_the_run_in_a_checkpoint_and_one_rank_tells(
    config: TrainConfig, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_ladder.py", "--ddp",
        "--data", config.data, "--out", config.out, "--dim", "16", "--depth", "2", "--seq-len", "32", "--batch-size",
        "8", "--steps", "1000000", "--eval-bytes", "500", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    metrics = config.out / "metrics.jsonl"  # type: ignore[operator]
    deadline = time.monotonic() + 100
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert output.count("stopped at step") == 1, errors
    assert output.count("parameters") == 1
    assert load_model(config.out) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "size", "number"),
    [
        (26, 61_959_040, 13),  # E1 of 403M
        (7, 28_000_000, 4),
        (6, 33_000_000, 4),
        (32, 375_000_000, 32),
        (40, 30_000_000, 10),
        (2, 9, 2),
        (1, 0, 1),
    ],
)
def test_units_are_equal_small_and_as_few_as_that_allows(layers: int, size: int, number: int) -> None:
    found = units([size] * layers)
    assert [layer for unit in found for layer in unit] == list(range(layers))
    assert len(found) == number
    lengths = {len(unit) for unit in found}
    assert max(lengths) - min(lengths) <= 1
    assert layers * size <= number * 125_000_000 or number == layers


@pytest.mark.parametrize("mixers", [CAPPED, HYBRID], ids=str)
def test_layers_that_are_gathered_together_train_as_one_process_does(
    ranks: Ranks, config: TrainConfig, tmp_path: Path, mixers: tuple[MixerConfig, ...]
) -> None:
    """Seven layers are four units: in parts of a batch, from a state, around evaluations, looks and a checkpoint."""
    config = replace(
        config, depth=7, sampling="tbptt", schedule="constant", grad_accum=2, stats_every=2, eval_every=3, seq_len=16
    )
    start(replace(config, out=tmp_path / "one", grad_accum=4), mixers)
    finish(ranks.run(start, replace(config, parallel="fsdp", steps=3), mixers))
    finish(ranks.run(goes_on, replace(config, parallel="fsdp", steps=5)))
    assert goes_on(replace(config, parallel="none"))[0] == 0
    (found, heldout), (wanted, one) = both(config.out), both(tmp_path / "one")
    assert found == pytest.approx(wanted, rel=1e-4)
    assert heldout["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-4)


def test_shards_that_cannot_be_compiled_train_as_plain_ones(ranks: Ranks, config: TrainConfig, tmp_path: Path) -> None:
    """A pass that ends within a unit leaves nothing behind."""
    config = replace(config, parallel="fsdp", depth=8)
    assert units([1] * config.depth)[0] == range(2)
    finish(ranks.run(start, replace(config, out=tmp_path / "plain")))
    outputs = finish(ranks.run(without_compiler, config))
    assert "not compiled, so slower: torch.compile fails here (RuntimeError: no C compiler found)" in outputs[0]
    assert both(config.out) == both(tmp_path / "plain")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_gpus_give_the_losses_of_one_and_go_on_to_the_bit(
    ranks: Ranks, config: TrainConfig, tmp_path: Path, kind: Any, optimizer: Any
) -> None:
    """In bf16 and compiled where that works, with kernels of ours; copies wait for nothing after their first steps."""
    config = replace(config, device="cuda", dim=64, steps=30, schedule="constant", save_every=20, optimizer=optimizer)
    start(replace(config, out=tmp_path / "one", grad_accum=2), CAPPED)
    config = replace(config, parallel=kind)
    finish(ranks.run(watched, replace(config, out=tmp_path / "whole")))
    finish(ranks.run(start, replace(config, steps=20), CAPPED))
    finish(ranks.run(goes_on, config))
    assert losses(config.out) == losses(tmp_path / "whole")
    assert losses(config.out) == pytest.approx(losses(tmp_path / "one"), rel=0.02)
    assert load_model(config.out) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixers", [E1, HYBRID], ids=str)
def test_statistics_of_ranks_change_no_bit_and_are_those_of_the_whole_gradient(
    ranks: Ranks, config: TrainConfig, tmp_path: Path, kind: Any, mixers: tuple[MixerConfig, ...]
) -> None:
    # In short windows: what the profiler writes of three steps grows with them.
    config = replace(config, grad_clip=0.0, stats_every=2, schedule="constant", seq_len=8)
    start(replace(config, out=tmp_path / "one", grad_accum=2), mixers)
    finish(ranks.run(start, replace(config, parallel=kind, profile=True, steps=14), mixers))
    finish(ranks.run(start, replace(config, parallel=kind, out=tmp_path / "without", stats_every=0, steps=14), mixers))
    assert both(config.out) == both(tmp_path / "without")
    rows = [
        {row["step"]: row["stats"] for row in RunFolder(path).read_metrics() if "stats" in row}  # type: ignore[arg-type]
        for path in (config.out, tmp_path / "one")
    ]
    for step in (2, 4, 6):
        found, wanted = (row[step] for row in rows)
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            assert found[name] == pytest.approx(values, rel=1e-4), name
    assert (config.out / "tensorboard").exists()  # type: ignore[operator]
    assert (config.out / "profile.json.gz").exists()  # type: ignore[operator]

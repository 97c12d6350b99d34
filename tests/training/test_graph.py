"""Steps that are captured and replayed are the steps that are not, to the bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elman.data.loading import TensorBatch
from elman.errors import TrainingError, UsageError
from elman.mixers import MixerConfig, mixer_config
from elman.ops import persistent
from elman.training import graph
from elman.training.config import TaskConfig, TrainConfig
from elman.training.graph import StepGraph
from elman.training.loop import Trainer
from elman.training.run import RunFolder
from tests.training.runs import CAPPED, E1, losses, resume, start
from tests.training.tape import TapeRecorder


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[TapeRecorder]:
    """Let steps be captured on a CPU, by stand-ins; the list of those that were made."""
    made: list[TapeRecorder] = []

    def make(device: torch.device) -> TapeRecorder:
        made.append(TapeRecorder(device))
        return made[-1]

    monkeypatch.setattr(graph, "why_not", lambda config, device: None)
    monkeypatch.setattr(graph, "CudaRecorder", make)
    return made


def rows(path: Path | None) -> list[dict[str, Any]]:
    """All that was measured but for the time that it took."""
    assert path is not None
    timed = ("seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in RunFolder(path).read_metrics()]


@pytest.mark.parametrize(
    ("mixers", "changes"),
    [
        (E1, {}),
        (E1, {"grad_accum": 2, "sampling": "tbptt"}),
        (E1, {"sampling": "documents", "schedule": "constant", "grad_clip": 0.01}),
        (CAPPED, {"precision": "bf16", "stats_every": 4}),
        ((mixer_config("gru")(), mixer_config("mamba2")(d_state=8)), {"stats_every": 5, "sampling": "tbptt"}),
    ],
    ids=str,
)
def test_captured_steps_are_those_of_a_plain_run_bit_for_bit(
    config: TrainConfig,
    tmp_path: Path,
    recorders: list[TapeRecorder],
    mixers: tuple[MixerConfig, ...],
    changes: dict[str, Any],
) -> None:
    config = replace(config, steps=20, **changes)
    start(replace(config, graph="off", out=tmp_path / "plain"), mixers)
    assert not recorders
    _, output = start(replace(config, graph="on"), mixers)
    (recorder,) = recorders
    assert (recorder.plain, recorder.recorded, recorder.replayed) == (3, 1, 17)
    assert ", captured; run folder" in output
    assert rows(config.out) == rows(tmp_path / "plain")
    (session,) = json.loads((config.out / "env.json").read_text())  # type: ignore[operator]
    assert session["captured"] is True


def test_steps_of_a_task_are_captured_whatever_their_lengths(tmp_path: Path, recorders: list[TapeRecorder]) -> None:
    config = TaskConfig(
        task="copying", dim=16, depth=2, seq_len=12, batch_size=4, steps=12, lr=1e-2, device="cpu", eval_examples=5,
        eval_multiples=(2,),
    )  # fmt: skip
    start(replace(config, graph="off", out=tmp_path / "plain"))
    start(replace(config, graph="on", out=tmp_path / "captured"))
    (recorder,) = recorders
    assert (recorder.plain, recorder.recorded, recorder.replayed) == (3, 1, 9)
    assert rows(tmp_path / "captured") == rows(tmp_path / "plain")


def test_the_stand_in_would_notice_a_rate_that_the_host_keeps(
    config: TrainConfig, tmp_path: Path, recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(replace(config, graph="off", out=tmp_path / "plain"))
    monkeypatch.setattr("elman.training.optim.Optimizer._share_rates", lambda optimizer: None)
    start(replace(config, graph="on"))
    captured, plain = losses(config.out), losses(tmp_path / "plain")
    assert [captured[step] for step in (1, 2, 3)] != [plain[step] for step in (1, 2, 3)]


def test_the_stand_in_would_notice_a_state_that_moves(
    config: TrainConfig, tmp_path: Path, recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, sampling="tbptt")
    start(replace(config, graph="off", out=tmp_path / "plain"))
    monkeypatch.setattr("elman.training.carry.Carry.settle", lambda carry, places: None)
    start(replace(config, graph="on"))
    captured, plain = losses(config.out), losses(tmp_path / "plain")
    assert [captured[step] for step in range(1, 5)] == [plain[step] for step in range(1, 5)]
    assert captured[6] != plain[6]


def test_a_captured_run_resumes_bit_for_bit_captured_or_not(
    config: TrainConfig, tmp_path: Path, recorders: list[TapeRecorder]
) -> None:
    config = replace(config, schedule="constant", sampling="tbptt", graph="on")
    start(replace(config, steps=24, out=tmp_path / "whole"))
    start(config)
    resume(config, steps=18, graph="off")
    resume(config, steps=24, graph="on")
    assert losses(config.out) == losses(tmp_path / "whole")
    assert [recorder.recorded for recorder in recorders] == [1, 1, 1]


def test_a_captured_step_that_is_not_finite_is_skipped(
    config: TrainConfig, tmp_path: Path, recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a factor that lies on the device, since a graph knows no other."""
    accumulate, step = Trainer._accumulate_gradients, Trainer._train_step
    factor = torch.ones(())

    def poison(trainer: Trainer) -> torch.Tensor:
        return accumulate(trainer) * factor

    def choose(trainer: Trainer) -> Any:
        factor.fill_(torch.nan if trainer.step + 1 in (6, 7) else 1.0)
        return step(trainer)

    monkeypatch.setattr(Trainer, "_accumulate_gradients", poison)
    monkeypatch.setattr(Trainer, "_train_step", choose)
    config = replace(config, sampling="tbptt")
    for out, setting in ((tmp_path / "plain", "off"), (config.out, "on")):
        start(replace(config, out=out, graph=setting))  # type: ignore[arg-type]
    assert [row["skipped"] for row in rows(config.out) if "skipped" in row] == [1, 2]
    assert rows(config.out) == rows(tmp_path / "plain")


def test_capturing_is_no_training_time_and_steps_end_where_they_should(
    config: TrainConfig, recorders: list[TapeRecorder]
) -> None:
    """A run that is over before it is captured, and one that is captured at its last step but one."""
    for steps, recorded in ((3, 0), (4, 1)):
        out = config.out.with_name(f"run-{steps}")  # type: ignore[union-attr]
        start(replace(config, steps=steps, out=out, graph="on"))
        assert len(losses(out)) == steps
        assert recorders[-1].recorded == recorded
        assert RunFolder(out).read_json("summary.json")["start_up_seconds"] > 0


def test_what_cannot_be_captured_goes_on_plainly_or_ends_with_its_reason(
    config: TrainConfig, tmp_path: Path, recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that asks its device for a number."""
    start(replace(config, graph="off", out=tmp_path / "plain", sampling="tbptt"))
    accumulate = Trainer._accumulate_gradients

    def ask(trainer: Trainer) -> torch.Tensor:
        loss = accumulate(trainer)
        assert loss.item() > 0
        return loss

    monkeypatch.setattr(Trainer, "_accumulate_gradients", ask)
    code, output = start(replace(config, graph="auto", sampling="tbptt"))
    assert code == 0
    assert "not captured, so slower: a CUDA graph cannot hold a step here (RuntimeError: operation not" in output
    assert losses(config.out) == losses(tmp_path / "plain")
    with pytest.raises(TrainingError, match=r"a step cannot be captured here \(RuntimeError: .*: give --graph off"):
        start(replace(config, out=tmp_path / "on", graph="on"))


def test_auto_captures_where_it_can(config: TrainConfig, recorders: list[TapeRecorder]) -> None:
    """Not in fp16, where a capture that fails could not be taken back."""
    for precision, captures in (("fp32", True), ("fp16", False)):
        recorders.clear()
        out = config.out.with_name(precision)  # type: ignore[union-attr]
        _, output = start(replace(config, out=out, precision=precision, graph="auto"))  # type: ignore[arg-type]
        assert sum(recorder.recorded for recorder in recorders) == captures
        assert (", captured" in output) == captures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"--graph on: a CUDA graph needs an NVIDIA GPU, not device cpu: give --graph off"),
        ({"graph": "sometimes"}, r"--graph 'sometimes' is unknown: choose one of auto, on, off"),
    ],
)
def test_asking_for_what_cannot_be_is_a_users_mistake(
    config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        start(replace(config, **{"graph": "on", **changes}))
    assert not config.out.exists()  # type: ignore[union-attr]
    assert start(replace(config, graph="auto"))[0] == 0


def test_optimisers_that_count_on_the_host_are_not_captured() -> None:
    config = TrainConfig(steps=1, optimizer="muon", graph="on")
    reason = graph.why_not(config, torch.device("cuda"))
    assert reason == "--optimizer muon counts on the host: give --optimizer adamw, or --graph off"


def test_a_batch_is_placed_where_the_last_one_was() -> None:
    captured = StepGraph(TapeRecorder(torch.device("cpu")), torch.device("cpu"))
    captured.place(TensorBatch(torch.arange(6, dtype=torch.uint8).view(2, 3), torch.tensor([[True], [False]])))
    first = captured.batch
    captured.place(TensorBatch(torch.full((2, 3), 9, dtype=torch.uint8), torch.tensor([[False], [True]])))
    second = captured.batch
    assert first is not None
    assert second is not None
    for a, b, expected in zip(first[:2], second[:2], (9, torch.tensor([[False], [True]])), strict=True):
        assert a is b
        assert (a == expected).all()


def test_kernels_are_chosen_for_graphs_before_there_is_one(
    config: TrainConfig, recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all that is captured later; not in evaluation, which is not."""
    seen: dict[str, set[bool]] = {"step": set(), "evaluate": set()}

    def watch(name: str, method: str) -> None:
        real = getattr(Trainer, method)

        def watched(trainer: Trainer, *given: Any, **named: Any) -> Any:
            seen[name].add(persistent._is_captured())
            return real(trainer, *given, **named)

        monkeypatch.setattr(Trainer, method, watched)

    watch("step", "_accumulate_gradients")
    watch("evaluate", "_evaluate")
    start(replace(config, graph="on"))
    assert seen["step"] == {True}
    assert seen["evaluate"] == {False}
    start(replace(config, graph="off", out=config.out.with_name("plain")))  # type: ignore[union-attr]
    assert seen["step"] == {True, False}


@pytest.mark.gpu
@pytest.mark.parametrize("compile_", ["on", "off"])
@pytest.mark.parametrize(
    ("mixer", "changes"),
    [
        (mixer_config("e1")(), {}),
        (mixer_config("e1")(constraint="spectral_norm"), {"grad_accum": 2, "sampling": "tbptt", "stats_every": 10}),
        (mixer_config("e5")(), {"sampling": "documents"}),
        (mixer_config("gru")(kernels="elman"), {"stats_every": 7}),
        (mixer_config("rnn")(), {}),
        (mixer_config("e10")(), {"precision": "fp16"}),
        (mixer_config("transformer")(head_dim=16), {}),
    ],
    ids=str,
)
def test_on_the_gpu_a_captured_run_has_the_losses_of_a_plain_one_bit_for_bit(
    config: TrainConfig, tmp_path: Path, mixer: MixerConfig, changes: dict[str, Any], compile_: Any
) -> None:
    config = replace(config, device="cuda", steps=40, dim=64, warmup=5, compile=compile_, **changes)
    start(replace(config, graph="off", out=tmp_path / "plain"), (mixer,))
    start(replace(config, graph="on"), (mixer,))
    assert losses(config.out) == losses(tmp_path / "plain")
    assert RunFolder(config.out).read_json("env.json")[0]["captured"] is True  # type: ignore[arg-type]
    assert losses(config.out)[40] < losses(config.out)[1]
    assert rows(config.out)[-1]["heldout_loss"] == rows(tmp_path / "plain")[-1]["heldout_loss"]


@pytest.mark.gpu
def test_on_the_gpu_a_captured_run_resumes_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, device="cuda", schedule="constant", save_every=10, graph="on")
    start(replace(config, steps=40, out=tmp_path / "whole"))
    start(replace(config, steps=20))
    resume(config, steps=40)
    assert losses(config.out) == losses(tmp_path / "whole")

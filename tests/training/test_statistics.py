"""The statistics of the layers: right, and without a trace in the run."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elman.mixers import MixerConfig, mixer_config
from elman.ops.operators import BlockDiagonal, Dense, Diagonal, LowRank
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.run import RunFolder
from elman.training.statistics import norm_and_radius
from tests.training.runs import CAPPED, E1, losses, start
from tests.training.test_loop import pretend_to_compile


def stats(path: Path | None) -> dict[int, dict[str, Any]]:
    assert path is not None
    return {row["step"]: row["stats"] for row in RunFolder(path).read_metrics() if "stats" in row}


@pytest.mark.parametrize(
    ("mixers", "changes"),
    [
        (E1, {}),
        (E1, {"grad_accum": 2, "sampling": "tbptt", "precision": "bf16"}),
        (E1, {"sampling": "documents"}),
        (CAPPED, {"optimizer": "muon", "precision": "fp16"}),
        ((mixer_config("mamba2")(d_state=8), mixer_config("gru")()), {}),
    ],
    ids=str,
)
def test_a_run_with_statistics_has_the_bits_of_one_without(
    config: TrainConfig, tmp_path: Path, mixers: tuple[MixerConfig, ...], changes: dict[str, Any]
) -> None:
    config = replace(config, **changes)
    start(replace(config, stats_every=3), mixers)
    start(replace(config, out=tmp_path / "without", stats_every=0), mixers)
    assert sorted(stats(config.out)) == [3, 6, 9, 12]
    assert stats(tmp_path / "without") == {}
    runs = [RunFolder(path).read_metrics() for path in (config.out, tmp_path / "without")]  # type: ignore[arg-type]
    with_, without = ([(row.get("loss"), row.get("heldout_loss"), row.get("grad_norm")) for row in run] for run in runs)
    assert with_ == without


def test_compiled_layers_are_seen_too_and_stay_compiled(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pretend_to_compile(monkeypatch)
    start(replace(config, compile="on", stats_every=4))
    assert len(calls) == 2
    start(replace(config, out=tmp_path / "plain", stats_every=0))
    assert losses(config.out) == losses(tmp_path / "plain")
    assert sorted(stats(config.out)) == [4, 8, 12]


def test_they_are_those_of_the_step_that_they_stand_beside(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights before the update and gradients before the clipping, against hooks of the step's own pass."""
    expected: dict[str, Any] = {}
    norms = Trainer._step_on_device

    def watched(trainer: Trainer, with_norms: bool) -> torch.Tensor:
        if not with_norms:
            return norms(trainer, with_norms)
        streams: list[float] = []
        handles = [
            layer.register_forward_hook(lambda m, a, output: streams.append(output[0].square().mean().sqrt().item()))
            for layer in trainer.model.layers
        ]
        weights = [layer.mixer.recurrence.weight_h.weight.detach().clone() for layer in trainer.model.layers]
        clip = torch.nn.utils.clip_grad_norm_

        def clip_and_note(parameters: Any, most: float) -> torch.Tensor:
            for layer in trainer.model.layers:
                squares = [parameter.grad.square().sum() for parameter in layer.parameters()]
                expected.setdefault("grad_norm", []).append(torch.stack(squares).sum().sqrt().item())
            return clip(parameters, most)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_note)
            values = norms(trainer, with_norms)
        for handle in handles:
            handle.remove()
        expected["residual_rms"] = streams
        expected["recurrent_norm"] = [torch.linalg.matrix_norm(weight, 2).item() for weight in weights]
        expected["recurrent_radius"] = [torch.linalg.eigvals(weight).abs().amax().item() for weight in weights]
        return values

    monkeypatch.setattr(Trainer, "_step_on_device", watched)
    start(replace(config, steps=30, stats_every=30, grad_clip=1e-3))
    (found,) = stats(config.out).values()
    for name in ("residual_rms", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert found["recurrent_norm"] == pytest.approx(expected["recurrent_norm"], rel=0.01)
    assert found["recurrent_radius"] == pytest.approx(expected["recurrent_radius"], rel=0.05)
    total = math.hypot(*found["grad_norm"], found["embedding_grad_norm"])
    (row,) = (row for row in RunFolder(config.out).read_metrics() if "stats" in row)  # type: ignore[arg-type]
    assert total == pytest.approx(row["grad_norm"], rel=1e-5)


def test_saturation_is_the_part_of_the_units_that_are_at_their_bound(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(replace(config, steps=1, stats_every=1, out=config.out.with_name("calm")))  # type: ignore[union-attr]
    step = Trainer._train_step

    def saturate(trainer: Trainer) -> Any:
        """A quarter of the first layer's units by their biases."""
        with torch.no_grad():
            trainer.model.layers[0].mixer.recurrence.input.bias[:4] = 50.0
        return step(trainer)

    monkeypatch.setattr(Trainer, "_train_step", saturate)
    start(replace(config, steps=1, stats_every=1))
    assert stats(config.out.with_name("calm"))[1]["saturation"] == [0, 0]  # type: ignore[union-attr]
    assert stats(config.out)[1]["saturation"] == [0.25, 0]


def test_layers_without_a_recurrence_have_none(config: TrainConfig) -> None:
    mixers = (mixer_config("e1")(), mixer_config("transformer")(head_dim=8))
    start(replace(config, stats_every=12), mixers)
    (found,) = stats(config.out).values()
    assert [value is not None for value in found["recurrent_norm"]] == [True, False, False]
    assert all(value > 0 for value in found["residual_rms"] + found["grad_norm"])
    start(replace(config, stats_every=12, out=config.out.with_name("none")), mixers[1:])  # type: ignore[union-attr]
    (found,) = stats(config.out.with_name("none")).values()  # type: ignore[union-attr]
    assert found.keys() == {"residual_rms", "grad_norm", "embedding_grad_norm"}


def test_what_is_not_finite_is_no_number_in_the_file(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate = Trainer._accumulate_gradients

    def spoil(trainer: Trainer) -> torch.Tensor:
        loss = accumulate(trainer)
        trainer.model.layers[1].mixer.in_proj.weight.grad.fill_(torch.inf)
        return loss

    monkeypatch.setattr(Trainer, "_accumulate_gradients", spoil)
    start(replace(config, steps=2, stats_every=2))
    (found,) = stats(config.out).values()
    assert found["grad_norm"][1] is None
    assert "NaN" not in (config.out / "metrics.jsonl").read_text()  # type: ignore[operator]


def rotations(*magnitudes: float) -> torch.Tensor:
    """A matrix of pairs of complex eigenvalues of these magnitudes."""
    turns = [
        size * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        for size, a in zip(magnitudes, (0.3, 1.1, 2.0, 2.9), strict=True)
    ]
    return torch.block_diag(*turns)


def test_norm_and_radius_of_every_operator() -> None:
    """Against PyTorch's decompositions, of matrices whose largest eigenvalue stands apart, as it must for a power."""
    torch.manual_seed(0)
    basis = torch.randn(8, 8) + 4 * torch.eye(8)
    matrix = basis @ rotations(0.9, 0.6, 0.5, 0.1) @ basis.inverse()
    for operator, blocks in (
        (Dense(matrix), [matrix]),
        (Dense(torch.stack((0.5 * matrix, 2 * matrix))), [2 * matrix]),
        (BlockDiagonal(torch.stack((matrix, 1.5 * matrix.mT))), [1.5 * matrix]),
        (LowRank(matrix[:, :6] @ torch.eye(6), torch.eye(8)[:6]), [matrix[:, :6] @ torch.eye(8)[:6]]),
    ):
        norm, radius = norm_and_radius(operator)
        assert norm == pytest.approx(max(torch.linalg.matrix_norm(block, 2).item() for block in blocks), rel=0.01)
        assert radius == pytest.approx(
            max(torch.linalg.eigvals(block).abs().amax().item() for block in blocks), rel=0.02
        )
    assert norm_and_radius(Diagonal(torch.tensor([0.1, -0.7, 0.5]))) == (pytest.approx(0.7), pytest.approx(0.7))


def test_what_grows_fast_or_vanishes_stays_a_number() -> None:
    for scale in (1e-6, 100.0):
        norm, radius = norm_and_radius(Dense(scale * rotations(1.0, 1.0, 1.0, 1.0)))
        assert (norm.item(), radius.item()) == (pytest.approx(scale, rel=1e-3), pytest.approx(scale, rel=1e-3))
    norm, radius = norm_and_radius(Dense(torch.zeros(4, 4)))
    assert norm < 1e-30
    assert radius < 1e-4


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    ("mixer", "square"), [(mixer_config("e1")(), "weight_h.weight"), (mixer_config("gru")(), "weight_hh_l0")], ids=str
)
def test_on_the_gpu_compiled_they_wait_for_nothing_and_change_no_bit(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixer: MixerConfig, square: str
) -> None:
    step = Trainer._train_step
    weights: list[torch.Tensor] = []

    def watched(trainer: Trainer) -> Any:
        if trainer.step == 59:
            weights.extend(p.detach().clone() for name, p in trainer.model.named_parameters() if name.endswith(square))
        torch.cuda.set_sync_debug_mode("error" if trainer.step >= 20 else "default")
        try:
            return step(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    config = replace(config, device="cuda", steps=60, dim=64, schedule="constant")
    start(replace(config, out=tmp_path / "without", stats_every=0), (mixer,))
    monkeypatch.setattr(Trainer, "_train_step", watched)
    start(replace(config, stats_every=10), (mixer,))
    assert losses(config.out) == losses(tmp_path / "without")
    assert sorted(stats(config.out)) == [10, 20, 30, 40, 50, 60]
    blocks = [weight.view(-1, weight.shape[1], weight.shape[1]) for weight in weights]
    norms = [torch.linalg.matrix_norm(block, 2).max().item() for block in blocks]
    assert len(norms) == 2
    assert stats(config.out)[60]["recurrent_norm"] == pytest.approx(norms, rel=0.02)

"""What a run leaves at its end."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from elman.environment import peak_memory
from elman.evaluation.heldout import HeldoutLoss
from elman.generation import generate
from elman.sizing import flops_per_token, num_params, state_size
from elman.text import readable
from elman.training.display import TrainingDisplay, print_summary
from elman.training.plot import plot_losses
from elman.units import format_count

if TYPE_CHECKING:
    from elman.training.loop import Trainer

_SAMPLE_BYTES = 300


def finish(trainer: Trainer, heldout: HeldoutLoss, display: TrainingDisplay) -> None:
    """Sample, picture and, last of all, the summary: where it lies, the run is complete."""
    run, model = trainer.run, trainer.model_config
    summary, sample = _summarise(trainer, heldout), _sample(trainer)
    if not trainer.processes.is_main:
        return
    (run.path / "sample.txt").write_text(sample, encoding="utf-8")
    title = f"{model.pattern}, {format_count(num_params(model))} parameters"
    plot_losses(run.read_metrics(), title, run.path / "loss.png", trainer.vocabulary.unit)
    run.write_json("summary.json", summary)
    display.close()
    print_summary(trainer.console, summary, sample)


def _sample(trainer: Trainer) -> str:
    """What the model writes from nothing, in characters that a terminal can show."""
    with trainer.optimizer.averaged():
        drawn = bytes(
            generate(
                trainer.model.eval(),
                b"",
                _SAMPLE_BYTES,
                seed=trainer.config.seed,
                vocabulary=trainer.vocabulary,
                resets=trainer.sampler.resets,
            )
        )
    return readable(drawn.decode("utf-8", "replace"))


def _summarise(trainer: Trainer, heldout: HeldoutLoss) -> dict[str, Any]:
    model, config = trainer.model_config, trainer.config
    tokens = trainer.step * trainer.tokens_per_step
    speed = tokens / trainer.seconds
    return {
        "model": model.pattern,
        "params": num_params(model),
        "dim": model.dim,
        "depth": model.depth,
        "flops_per_token": flops_per_token(model, config.seq_len),
        "state_size": state_size(model, config.seq_len),
        "seq_len": config.seq_len,
        "batch_size": config.batch_size,
        "processes": trainer.processes.size,
        "parallel": trainer.processes.kind,
        "steps": trainer.step,
        "tokens": tokens,
        "compiled": trainer.compiled,
        "start_up_seconds": trainer.start_up_seconds,
        "train_seconds": trainer.seconds,
        "tokens_per_second": speed,
        "mfu": trainer.utilisation.at(speed),
        "peak_memory_bytes": peak_memory(trainer.device),
        "skipped_steps": trainer.skipped,
        "last_100_loss": trainer.last_100_loss,
        "unit": trainer.vocabulary.unit,
        "heldout": {
            **asdict(heldout),
            "nats_per_byte": heldout.nats_per_byte,
            "bits_per_byte": heldout.bits_per_byte,
        },
    }

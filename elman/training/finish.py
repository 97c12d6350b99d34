"""What a run leaves at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elman.environment import peak_memory
from elman.sizing import flops_per_token, num_params, state_size
from elman.training.display import TrainingDisplay, print_summary
from elman.training.plot import plot_losses
from elman.training.source import Outcome
from elman.units import format_count

if TYPE_CHECKING:
    from elman.training.loop import Trainer


def finish(trainer: Trainer, outcome: Outcome, display: TrainingDisplay) -> None:
    """What the source leaves, a picture and, last of all, the summary: where it lies, the run is complete."""
    run, model = trainer.run, trainer.model_config
    summary = {**_summarise(trainer), **outcome.summary()}
    shown = trainer.source.leave(trainer, outcome)
    if not trainer.processes.is_main:
        return
    title = f"{model.pattern}, {format_count(num_params(model))} parameters"
    plot_losses(run.read_metrics(), title, run.path / "loss.png", trainer.source.unit)
    run.write_json("summary.json", summary)
    display.close()
    print_summary(trainer.console, summary, outcome.facts(), shown)


def _summarise(trainer: Trainer) -> dict[str, Any]:
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
        "unit": trainer.source.unit,
    }

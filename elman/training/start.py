"""From options to a run: makes or reopens its folder, trains, and says how it ended."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from elman.data.stdlib import pack_stdlib, stdlib_files, stdlib_path
from elman.environment import describe_environment, is_out_of_memory
from elman.errors import TrainingError, UsageError
from elman.mixers import MixerConfig
from elman.model import ModelConfig
from elman.options import flag
from elman.sizing import flops_per_token, num_params, size_model, state_size
from elman.training.checks import slow_option
from elman.training.config import RunConfig, TrainConfig
from elman.training.display import say
from elman.training.distributed import Processes, process_group
from elman.training.loop import Trainer
from elman.training.memory import advice
from elman.training.run import RunFolder, check_free, create, newest_checkpoint, open_run
from elman.units import format_count, format_duration

#: What may be given anew when a run goes on; anything else would make it another run.
_RESUMABLE = (
    *("steps", "time_limit", "data", "device", "parallel", "compile", "workers"),
    *("eval_every", "save_every", "max_skipped"),
    *("graph", "profile", "stats_every", "tensorboard", "wandb"),
)


def start_run(
    config: RunConfig, mixers: tuple[MixerConfig, ...], console: Console, study: dict[str, Any] | None = None
) -> int:
    """Train a new run. Returns the exit code: 0, or 130 if it was stopped and saved.

    Under torchrun every process calls this, and rank 0 writes and prints. ``study`` is what study.json shall tell of
    the study that the run is a part of.
    """
    with process_group(config) as processes:
        console = console if processes.is_main else Console(quiet=True)
        with processes.together():
            if config.out is not None:
                check_free(config.out)
            model_config = _model_of(config, mixers)
        if isinstance(config, TrainConfig) and config.data is None:
            with processes.together():
                # Packed by one process of each machine.
                data = demo_data(console) if processes.local_rank == 0 else None
            config = replace(config, data=data if data is not None else demo_data(console))
        trainer = _build(config, model_config, console, processes)
        with _write_to(create(config.out, model_config.pattern), processes) as run:
            if study is not None:
                run.write_json("study.json", study)
            _write_config(run, config, model_config)
            if (complaint := slow_option(model_config, trainer.device, trainer.precision)) is not None:
                say(console, complaint)
            return _train(trainer, run)


def _model_of(config: RunConfig, mixers: tuple[MixerConfig, ...]) -> ModelConfig:
    """The model of a new run: of the size that is asked for, or of that of the run which it starts from.

    Raises:
        UsageError: no model has that size; or there is no such run, or it has other variants or other tokens.
    """
    if config.start_from is None:
        sizes: dict[str, Any] = {"params": config.param_count, "dim": config.dim, "depth": config.layers}
        return size_model(mixers, **sizes, vocab_size=config.vocab_size)
    _, model = open_run(config.start_from, "--start-from").read_config()
    wanted = ",".join(mixer.name for mixer in mixers)
    if wanted != (there := ",".join(mixer.name for mixer in model.mixers)):
        raise UsageError(f"--start-from {config.start_from} is a run of {there}, not {wanted}: drop --model")
    if model.vocab_size != config.vocab_size:
        raise UsageError(
            f"--start-from {config.start_from} is a run of {model.vocab_size} tokens, where this has "
            f"{config.vocab_size}: give what that run learned, and its --tokenizer"
        )
    return replace(model, mixers=mixers)


def resume_run(config: RunConfig, mixers: tuple[MixerConfig, ...], console: Console) -> int:
    """Go on with ``config.resume``; ``config`` is that run's own but for what may be given anew."""
    assert config.resume is not None
    with process_group(config) as processes:
        console = console if processes.is_main else Console(quiet=True)
        with _write_to(_reopened(config.resume), processes) as run:
            with processes.together():
                config, model_config = _changed(run, config, mixers)
            trainer = _build(config, model_config, console, processes, run)
            run.rewind_metrics(trainer.step)
            _write_config(run, config, model_config)
            say(console, f"going on from step {trainer.step}")
            return _train(trainer, run)


def _changed(run: RunFolder, config: RunConfig, mixers: tuple[MixerConfig, ...]) -> tuple[RunConfig, ModelConfig]:
    """The options that a run goes on with, and its model."""
    before, model_config = run.read_config()
    config = replace(config.resolved(), resume=None)
    changed = [name for name in vars(config) if getattr(config, name) != getattr(before, name)]
    for new, old in zip(mixers, model_config.mixers, strict=False):
        changed += [name for name in vars(new) if getattr(new, name) != getattr(old, name, None)]
    for name in changed:
        if name not in _RESUMABLE:
            raise UsageError(
                f"{flag(name)} cannot change when a run goes on: drop it, or start a new run "
                f"({', '.join(map(flag, _RESUMABLE))} may be given anew)"
            )
    # An end given anew replaces the old one, be that in steps or in time.
    if "steps" in changed and "time_limit" not in changed:
        config = replace(config, time_limit=None)
    if "time_limit" in changed and "steps" not in changed:
        config = replace(config, steps=None)
    return config, model_config


@contextlib.contextmanager
def _reopened(path: Path) -> Iterator[RunFolder]:
    run = open_run(path, "--resume")
    with run.lock():
        yield run


@contextlib.contextmanager
def _write_to(opened: AbstractContextManager[RunFolder], processes: Processes) -> Iterator[RunFolder]:
    """The folder that rank 0 makes or locks, for all ranks."""
    with contextlib.ExitStack() as stack:
        run: RunFolder | None = None
        with processes.together():
            if processes.is_main:
                run = stack.enter_context(opened)
        path = processes.of_main(None if run is None else run.path)
        assert path is not None
        yield run or RunFolder(path, writes=False)


def _build(
    config: RunConfig, model: ModelConfig, console: Console, processes: Processes, run: RunFolder | None = None
) -> Trainer:
    """A trainer that is ready to go on with a run, or to begin one."""
    trainer = Trainer(config, model, console, processes)
    if config.start_from is not None and (run is None or processes.of_main(newest_checkpoint(run)) is None):
        trainer.start_from(open_run(config.start_from, "--start-from"))
    if run is not None:
        trainer.restore(run)
        with processes.together():
            if trainer.progress >= 1 and run.read_json("summary.json") is not None:
                raise UsageError(
                    f"--resume {run.path}: this run has reached its end (step {trainer.step}, "
                    f"{format_duration(trainer.seconds)}): give more --steps or a longer --time-limit"
                )
    _warm_up(trainer)
    return trainer


def _write_config(run: RunFolder, config: RunConfig, model: ModelConfig) -> None:
    # A profile is taken where it is asked for, and not again when the run goes on.
    run.write_config(replace(config.resolved(), out=run.path, profile=False), model)


def demo_data(console: Console) -> Path:
    """The standard library's sources, packed at the first call."""
    path = stdlib_path()
    if not path.exists():
        files = stdlib_files()
        total = sum(file.stat().st_size for file in files)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("packing Python's standard library", total=total)
            pack_stdlib(files, lambda file: progress.open(file, "rb", task_id=task, total=total))
    return path


def _warm_up(trainer: Trainer) -> None:
    if trainer.will_compile:
        say(trainer.console, "compiling; this is not training time (--compile off does without)")
    with _advice_on_memory(trainer):
        trainer.warm_up()


@contextlib.contextmanager
def _advice_on_memory(trainer: Trainer) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(advice(trainer, error)) from None


def _train(trainer: Trainer, run: RunFolder) -> int:
    console = trainer.console
    _print_head(trainer, run)
    cure = f"once that is mended, go on with: elman train --resume {run.path}"
    try:
        sessions = run.read_json("env.json")
        sessions = sessions if isinstance(sessions, list) else []
        run.write_json("env.json", [*sessions, _environment(trainer)])
        with _advice_on_memory(trainer):
            finished = trainer.train(run)
    except OSError as error:
        raise TrainingError(f"{run.path} cannot be written ({error.strerror or error}); {cure}") from None
    if finished:
        for line in trainer.source.farewell(run):
            say(console, line)
        return 0
    say(console, f"stopped at step {trainer.step}, saved in {run.path}; go on with: elman train --resume {run.path}")
    return 130


def _environment(trainer: Trainer) -> dict[str, Any]:
    """The machine's facts, and the backend that each recurrence of the model takes on this shape."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "from_step": trainer.step,
        "started_from": trainer.started_from,
        "data": trainer.source.fingerprint,
        "precision": trainer.precision,
        "compiled": trainer.compiled,
        "captured": trainer.graph is not None,
        "processes": trainer.processes.size,
        "parallel": trainer.processes.kind,
        "start_up_seconds": trainer.start_up_seconds,
        "backends": trainer.backends(),
        **describe_environment(trainer.device),
    }


def _print_head(trainer: Trainer, run: RunFolder) -> None:
    model, config = trainer.model_config, trainer.config
    say(trainer.console, model_line(model, config.seq_len))
    where = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else str(trainer.device)
    how = f"{config.optimizer}, {trainer.precision}, {'compiled' if trainer.compiled else 'not compiled'}"
    how += "" if trainer.graph is None else ", captured"
    if trainer.processes.kind != "none":
        how += f", {trainer.processes.kind} over {trainer.processes.size} processes"
    say(
        trainer.console,
        f"{trainer.source.describe()}; {where}, {how}; run folder {run.path}",
    )


def model_line(model: ModelConfig, seq_len: int) -> str:
    """A model in one line: what it is and its counts."""
    return (
        f"{model.pattern}: width {model.dim}, depth {model.depth}, {num_params(model):,} parameters, "
        f"{format_count(flops_per_token(model, seq_len))} forward FLOPs a token, "
        f"{format_count(state_size(model, seq_len))} numbers of state"
    )

"""``elman eval``: reads a text with a run's model in several ways, shows the losses, and leaves them in its folder."""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from elman.data.bytes import ByteData, Bytes, heldout_starts, map_bytes, open_bytes
from elman.environment import describe_environment, resolve_device
from elman.errors import UsageError
from elman.evaluation.heldout import HeldoutLoss, HeldoutText, evaluate
from elman.evaluation.long_text import (
    TARGETS,
    Reader,
    carried_cost,
    carried_loss,
    context_cost,
    context_losses,
    context_rows,
    fitting_contexts,
)
from elman.evaluation.report import Evaluation, write
from elman.inference import advise_on_memory, autocast_dtype, freeze
from elman.sizing import num_params
from elman.text import one_line
from elman.training.checkpoint import data_of
from elman.training.config import TrainConfig
from elman.training.run import load_text, make_unique, open_model, open_run
from elman.units import bits, format_count, parse_count

Mode = Literal["both", "carried", "windows"]
#: Places where contexts are compared, unless it is said how many.
_GPU_ROWS = 128
_CPU_ROWS = 16


@dataclass(frozen=True)
class Request:
    """What ``elman eval`` was asked for; see its options."""

    run: Path
    data: Path | None = None
    mode: Mode = "both"
    contexts: tuple[int, ...] = ()
    context_rows: int | None = None
    max_bytes: str | None = None
    batch_size: int = 64
    precision: str = "auto"
    device: str = "auto"


def run_evaluation(request: Request, console: Console) -> int:
    """All that was asked for, with a bar; the folder is made once all is there."""
    started = time.monotonic()
    for option, value in (
        ("--batch-size", request.batch_size),
        ("--context-rows", 1 if request.context_rows is None else request.context_rows),
        *(("--contexts", context) for context in request.contexts),
    ):
        if not 1 <= value <= 2**30:
            alone = "; 0, for none, stands alone" if (option, value) == ("--contexts", 0) else ""
            raise UsageError(f"{option} {value} is out of range: give a number of at least 1, and up to 2^30{alone}")
    limit = None if request.max_bytes is None else parse_count(request.max_bytes, "--max-bytes")
    device = resolve_device(request.device)
    dtype = autocast_dtype(request.precision, device)
    run = open_run(request.run)
    config, model_config = run.read_text_config()
    if not os.access(run.path, os.W_OK):
        raise UsageError(f"RUN {run.path} cannot be written to, and the results go there: check its permissions")
    path, text, fingerprint = _text(request.data, config, limit)
    vocabulary, resets = load_text(request.run)
    tokens = vocabulary.encode(text)
    wants_carried, wants_windows = request.mode != "windows", request.mode != "carried"
    there = f"--data {path} has {len(tokens)} {vocabulary.unit}{'' if len(tokens) == 1 else 's'} to read"
    if wants_windows and len(tokens) < config.seq_len + 1:
        raise UsageError(
            f"{there}, fewer than a window of {config.seq_len + 1}: "
            f"give a longer file or --max-bytes, or --mode carried"
        )
    if len(tokens) < 2:
        raise UsageError(f"{there}, and the first cannot be predicted: give a longer file or --max-bytes")

    def say(line: str) -> None:
        console.print(one_line(line), soft_wrap=True)

    loaded, checkpoint = open_model(request.run, say)
    if fingerprint is not None and data_of(checkpoint) not in (None, fingerprint):
        raise UsageError(
            f"{path} is not the file that RUN {run.path} learned from, so what it held out is not known: "
            f"put that file back, or name a text by --data"
        )
    model = freeze(loaded.to(device), dtype)
    reader = Reader(model, vocabulary, resets, dtype)
    evaluation = Evaluation(
        run={
            "model": model_config.pattern,
            "params": num_params(model_config),
            "seq_len": config.seq_len,
            "sampling": config.sampling,
            "tokenizer": config.tokenizer,
            "checkpoint": checkpoint.name,
        },
        data={
            "file": str(path),
            "bytes": len(text),
            "tokens": len(tokens),
            "sha256": hashlib.sha256(text.data).hexdigest(),
        },
        unit=vocabulary.unit,
        environment=describe_environment(device) | {"precision": "fp32" if dtype is None else "bf16"},
    )
    if wants_carried and not reader.carries:
        reason = f"the state of {model_config.pattern} grows with the text, and is not carried through all of it"
        if request.mode == "carried":
            raise UsageError(f"--mode carried: {reason}: give --mode windows")
        evaluation.notes.append(f"{reason}: see the contexts for what it makes of long ones")
        wants_carried = False
    asked = sorted(set(request.contexts))
    contexts = fitting_contexts(tokens, asked)
    if left_out := [context for context in asked if context not in contexts]:
        evaluation.notes.append(
            f"contexts of {', '.join(f'{context:,}' for context in left_out)} {vocabulary.unit}s are left out: "
            f"the text has {len(tokens):,}, and {TARGETS} are predicted behind each"
        )
    most = request.context_rows or (_GPU_ROWS if device.type == "cuda" else _CPU_ROWS)
    rows = context_rows(tokens, contexts, most) if contexts else 0
    sizes = f"--batch-size {request.batch_size}, --context-rows {rows}, --contexts up to {max(contexts, default=0)}"
    with advise_on_memory(sizes, "give fewer of them, or --device cpu"), _Bar(console) as bar:
        if wants_windows:
            starts = heldout_starts(tokens, config.seq_len, len(tokens), vocabulary.unit)
            cut = HeldoutText(tokens, starts, config.seq_len, vocabulary, resets)
            tell = bar.begin("windows", len(cut.starts) * cut.seq_len)
            evaluation.windows = _windows(reader, cut, request.batch_size, tell)
        if wants_carried:
            tell = bar.begin("state carried", carried_cost(tokens))
            evaluation.carried, evaluation.positions = carried_loss(reader, tokens, tell)
        if contexts:
            tell = bar.begin("contexts", context_cost(contexts, rows))
            evaluation.contexts = context_losses(reader, tokens, contexts, rows, tell)
    evaluation.seconds = time.monotonic() - started
    _show(evaluation, console)
    folder = make_unique(run.path, f"eval-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    write(evaluation, folder)
    say(f"results in {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    return 0


def _text(data: Path | None, config: TrainConfig, limit: int | None) -> tuple[Path, Bytes, str | None]:
    """The file and its bytes, at most so many; without one the text that the run held out, and a fingerprint."""
    if data is not None:
        return data, map_bytes(data, "--data")[:limit], None
    if config.data is None:
        raise UsageError("the run's config.json names no text that was held out: name one by --data")
    held: ByteData = open_bytes(config.data, config.heldout)
    return config.data, held.heldout[:limit], held.fingerprint()


def _windows(reader: Reader, text: HeldoutText, batch_size: int, tell: Callable[[int], None]) -> HeldoutLoss:
    done = 0

    def stop() -> bool:
        nonlocal done
        tell(min(batch_size, len(text.starts) - done) * text.seq_len if done else 0)
        done += batch_size
        return False

    loss = evaluate(
        reader.model, text, batch_size=batch_size, device=reader.device, autocast=reader.autocast, stop=stop
    )
    assert loss is not None
    return loss


class _Bar:
    """What is being read, how fast, and how long it will take, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("[cyan]ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, name: str, total: int) -> Callable[[int], None]:
        """A line of so many tokens; returns what is told of tokens that were read."""
        task: TaskID = self._progress.add_task(name, total=total, speed="")
        begun, read = time.monotonic(), 0

        def tell(count: int) -> None:
            nonlocal read
            read += count
            speed = read / max(1e-9, time.monotonic() - begun)
            self._progress.update(task, advance=count, speed=f"{format_count(speed)} tok/s")

        return tell


def _show(evaluation: Evaluation, console: Console) -> None:
    table = Table(
        title=f"{evaluation.run['model']} on {evaluation.data['bytes']:,} bytes",
        show_header=False,
        title_justify="left",
    )
    table.add_column(style="cyan")
    table.add_column(justify="right")
    for name, loss in evaluation.totals():
        table.add_row(name, loss)
    for row in evaluation.contexts:
        loss = f"{row.nats_per_byte:.4f} nats/byte  {bits(row.nats_per_byte):.4f} bits/byte"
        table.add_row(f"context of {row.context:,}", loss)
    console.print(table)
    for note in evaluation.notes:
        console.print(one_line(note), soft_wrap=True)

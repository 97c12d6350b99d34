"""How fast does a whole training step run, where does its time go, and what do all things beside it cost?

    python -m benchmarks.train_step [--groups 50m 400m launches] [--commit HASH]

Takes the steps that ``elman train`` takes (batch, both passes, clipping, AdamW) on random bytes, T = 512, one model
after the other on one GPU:

    50m        E1 d1280 x 6 (compiled, captured, plain), official Mamba2 and the Transformer at 50M parameters, B = 256
    400m       E1 d1760 x 26 (compiled, captured) and Mamba2 d1440 x 32, B = 48
    launches   E5 and the GRU by our kernels at 50M, B = 256, whose steps have tens of thousands of kernels: does a
               CUDA graph of the whole step pay?

A step's time is that between two CUDA events, the host being free to run ahead, and the median of ``--steps`` after
some that do not count. For E1 three more are profiled, and then ``elman train``'s own loop runs, with metrics,
TensorBoard where it is installed, statistics of the layers and a checkpoint: what it takes beside the steps is the
table of overheads. Rows are printed, and written to benchmarks/results/ and the folder ``--out``, as soon as they are
known; the tables come last.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.cases import Case, first_line
from benchmarks.machine import machine
from benchmarks.models import words
from benchmarks.steps import device_slug, forget, random_bytes, step_times, write_json
from elman.environment import is_out_of_memory, peak_memory, resolve_device
from elman.model import ModelConfig
from elman.sizing import num_params, size_model
from elman.training.config import TrainConfig
from elman.training.loop import Trainer
from elman.training.profile import profile_steps
from elman.training.run import RunFolder

RESULTS = Path(__file__).parent / "results"
_WARM_UP_STEPS = 6
#: Steps that a checkpoint is written after, by default: what one costs is shared by so many.
_SAVE_EVERY = TrainConfig(steps=1).save_every
_STATS_EVERY = TrainConfig(steps=1).stats_every


@dataclass(frozen=True)
class Setting:
    """A model and how it is trained.

    Attributes:
        case: the model, sized for ``params`` at the case's depth, or of the width ``dim``.
        wanted: parameters that it must have within 2%.
        taken_apart: whether its step is profiled, and the loop around it measured.
    """

    group: str
    case: Case
    batch_size: int
    params: int = 50_000_000
    dim: int | None = None
    wanted: int | None = None
    compile: Literal["auto", "off"] = "auto"
    graph: Literal["on", "off"] = "off"
    taken_apart: bool = False

    @property
    def label(self) -> str:
        how = [*(["--compile off"] if self.compile == "off" else []), *(["--graph on"] if self.graph == "on" else [])]
        return " ".join((self.case.label, *how))

    def model(self) -> ModelConfig:
        if self.dim is None:
            model = self.case.size(self.params)
        else:
            model = size_model(self.case.mixers(), dim=self.dim, depth=self.case.depth)
        if self.wanted is not None and abs(num_params(model) / self.wanted - 1) > 0.02:
            raise AssertionError(f"{self.label} has {num_params(model):,} parameters, not {self.wanted:,} within 2%")
        return model


_E1_400M = Setting("400m", Case("e1", depth=26), 48, dim=1760, wanted=400_000_000)
SETTINGS = (
    Setting("50m", Case("e1"), 256, taken_apart=True),
    Setting("50m", Case("mamba2", depth=12), 256),
    Setting("50m", Case("transformer", depth=10), 256),
    replace(_E1_400M, taken_apart=True),
    Setting("400m", Case("mamba2", depth=32), 48, dim=1440),
    Setting("50m", Case("e1"), 256, graph="on"),
    Setting("50m", Case("e1"), 256, compile="off"),
    replace(_E1_400M, graph="on"),
    *(
        Setting("launches", case, 256, graph=graph)
        for case in (Case("e5"), Case("gru", {"kernels": "elman"}))
        for graph in ("off", "on")
    ),
)


@dataclass
class Row:
    """One setting. What is None was not measured, and ``note`` says why.

    Attributes:
        captured: whether a CUDA graph was replayed.
        shares: of a step, by class of kernels: name, ms, calls, part.
        kernels: the longest of them.
        overheads: what stands beside a step: its host's or its whole time in ms a step, and as a part of it.
    """

    model: str
    group: str
    batch_size: int
    dim: int | None = None
    depth: int | None = None
    params: int | None = None
    compiled: bool | None = None
    captured: bool | None = None
    precision: str | None = None
    start_up_seconds: float | None = None
    backends: dict[str, int] = field(default_factory=dict)
    ms_per_step: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None
    shares: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    overheads: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    groups: tuple[str, ...] = ("50m", "400m", "launches")
    """Of the settings above."""
    seq_len: int = 512
    """T, bytes a window."""
    steps: int = 30
    """Timed steps of every model."""
    seconds: float = 6.0
    """That these may take: a slow model is timed over fewer of them, three at least."""
    loop_steps: int = 100
    """Of the training loop that overheads are measured in."""
    time_limit: float = 400.0
    """Seconds after which no other model is begun."""
    device: str = "auto"
    """A GPU, if the numbers are to mean anything."""
    commit: str | None = None
    """To record, where the sources are no git checkout."""
    out: Path | None = None
    """A folder that the results are written to as well."""


def measure(setting: Setting, options: Options, data: Path, tell: Callable[[Row], None]) -> Row:
    """Train for a while; an error is a row that says so. ``tell`` is called whenever there is more of the row."""
    row = Row(setting.label, setting.group, setting.batch_size)
    try:
        _fill(row, setting, options, data, tell)
    except Exception as error:
        row.note = "out of memory" if is_out_of_memory(error) else first_line(error)
    forget()
    return row


def _fill(row: Row, setting: Setting, options: Options, data: Path, tell: Callable[[Row], None]) -> None:
    model = setting.model()
    row.dim, row.depth, row.params = model.dim, model.depth, num_params(model)
    config = TrainConfig(
        model=setting.case.pattern, seq_len=options.seq_len, batch_size=setting.batch_size, steps=10**6, data=data,
        device=options.device, compile=setting.compile, graph=setting.graph,
        eval_bytes=str(2 * setting.batch_size * (options.seq_len + 1)),
    )  # fmt: skip
    trainer = Trainer(config, model, Console(quiet=True))
    trainer.warm_up()
    row.compiled, row.precision = trainer.compiled, trainer.precision
    row.backends = dict(Counter(trainer.backends(options.seq_len)))
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    about = step_times(trainer, _WARM_UP_STEPS)[-1]
    trainer.capture()
    row.captured, row.start_up_seconds = trainer.graph is not None, trainer.start_up_seconds
    step_times(trainer, 3)
    steps = max(3, min(options.steps, int(1e3 * options.seconds / about)))
    ms = statistics.median(step_times(trainer, steps))
    row.ms_per_step, row.tokens_per_second = ms, setting.batch_size * options.seq_len / ms * 1e3
    row.mfu, row.peak_gib = trainer.utilisation.at(row.tokens_per_second), peak_memory(trainer.device) / 2**30
    if setting.taken_apart:
        tell(row)
        profile = profile_steps(trainer._train_step, trainer.device)
        row.shares, row.kernels = [asdict(share) for share in profile.shares], profile.kernels[:15]
        tell(row)
        row.overheads = overheads(trainer, options.loop_steps)


def overheads(trainer: Trainer, steps: int) -> list[dict[str, Any]]:
    """What ``elman train``'s loop takes beside its steps.

    What a batch costs is the median step less that with a batch which stays on the device, in turns. Metrics are the
    host's time, while the GPU works on; statistics and checkpoints are timed with the GPU waited for. The whole is the
    loop's time a step, saving and evaluating left out, over the median of as many bare steps, half of them before it
    and half behind, since a GPU that has been at work for a while is slower. A first loop takes what a run takes once,
    as the memory that checkpoints are copied to.
    """
    first_saves = _run_loop(trainer, max(1, steps // 5))[1]["_save"]
    fresh, still = [], []
    for _ in range(4):
        fresh += step_times(trainer, max(1, steps // 10))
        with _one_batch(trainer):
            still += step_times(trainer, max(1, steps // 10))
    bare = step_times(trainer, max(1, steps // 2))
    whole, times = _run_loop(trainer, steps)
    bare += step_times(trainer, max(1, steps // 2))
    step = statistics.median(bare)
    looks, saves = times["_look"], times["_save"]
    parts = {
        "data": statistics.median(fresh) - statistics.median(still),
        "metrics": sum(times["_report"]) / steps,
        f"statistics, every {_STATS_EVERY} steps": statistics.mean(looks) / _STATS_EVERY if looks else None,
        f"checkpoint, every {_SAVE_EVERY} steps": statistics.mean(saves) / _SAVE_EVERY,
        "all of the loop but checkpoints": whole - step,
        "a run's first checkpoint, once": statistics.mean(first_saves),
    }
    return [
        {"what": what, "ms": ms, "part": None if ms is None or "once" in what else ms / step}
        for what, ms in parts.items()
    ]


def _run_loop(trainer: Trainer, steps: int) -> tuple[float, dict[str, list[float]]]:
    """Milliseconds a step of ``elman train``'s own loop, and of each call of what it calls beside steps."""
    trainer.config = replace(trainer.config, steps=trainer.step + steps, eval_every=0, save_every=0)
    before = trainer.seconds
    with (
        tempfile.TemporaryDirectory() as folder,
        _stopwatch(trainer, "_report") as metrics,
        _stopwatch(trainer, "_look", wait=True) as looks,
        _stopwatch(trainer, "_save", wait=True) as saves,
    ):
        if not trainer.train(RunFolder(Path(folder))):
            raise KeyboardInterrupt
    trainer.model.train()  # its last act was to write a sample
    return 1e3 * (trainer.seconds - before) / steps, {"_report": metrics, "_look": looks, "_save": saves}


@contextlib.contextmanager
def _one_batch(trainer: Trainer) -> Iterator[None]:
    """Inside the ``with`` block every step reads the same batch, which lies on the device."""
    batch = trainer._batch()
    trainer._batch = lambda: batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        del trainer._batch


@contextlib.contextmanager
def _stopwatch(trainer: Trainer, method: str, wait: bool = False) -> Iterator[list[float]]:
    """Milliseconds of each call of a trainer's method inside the ``with`` block, the GPU waited for if so asked."""
    times: list[float] = []
    run = getattr(trainer, method)

    def settle() -> None:
        if wait and trainer.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(*given: Any, **named: Any) -> Any:
        settle()
        started = time.perf_counter()
        result = run(*given, **named)
        settle()
        times.append(1e3 * (time.perf_counter() - started))
        return result

    setattr(trainer, method, timed)
    try:
        yield times
    finally:
        delattr(trainer, method)


def speed_table(rows: Sequence[Row]) -> str:
    """Markdown: a line a setting."""
    columns = [
        "model",
        "width × depth",
        "parameters",
        "B",
        "ms a step",
        "tokens/s",
        "MFU",
        "GiB",
        "start-up, s",
        "runs",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        size = ["-", "-"] if row.params is None else [f"{row.dim} × {row.depth}", f"{row.params:,}"]
        values = [row.model, *size, str(row.batch_size)]
        if row.ms_per_step is None:
            values += [row.note or "-", *[""] * 5]
        else:
            mfu = "-" if row.mfu is None else f"{row.mfu:.1%}"
            values += [f"{row.ms_per_step:.2f}", f"{row.tokens_per_second:,.0f}", mfu, f"{row.peak_gib:.1f}"]
            how = [
                words(row.backends),
                *(["compiled"] if row.compiled else []),
                *(["captured"] if row.captured else []),
            ]
            values += [f"{row.start_up_seconds:.0f}", ", ".join(how) + (f" ({row.note})" if row.note else "")]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def share_table(rows: Sequence[Row]) -> str:
    """Markdown: where the time goes, a column a setting that was taken apart."""
    apart = [row for row in rows if row.shares]
    names = list(dict.fromkeys(share["name"] for row in apart for share in row.shares))
    heads = [f"{row.model}, {row.group}: ms | share | kernels" for row in apart]
    lines = ["| part | " + " | ".join(heads) + " |", "|---" * (1 + 3 * len(apart)) + "|"]
    for name in names:
        values = [name]
        for row in apart:
            share = next((share for share in row.shares if share["name"] == name), None)
            values += ["", "", ""] if share is None else [
                f"{share['ms']:.2f}", f"{share['part']:.1%}", f"{share['calls']:,.0f}"
            ]  # fmt: skip
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def overhead_table(rows: Sequence[Row]) -> str:
    """Markdown: what stands beside a step, a column a setting."""
    apart = [row for row in rows if row.overheads]
    names = list(dict.fromkeys(part["what"] for row in apart for part in row.overheads))
    heads = [f"{row.model}, {row.group}: ms a step | of a step" for row in apart]
    lines = ["| beside the step | " + " | ".join(heads) + " |", "|---" * (1 + 2 * len(apart)) + "|"]
    for name in names:
        values = [name]
        for row in apart:
            part = next((part for part in row.overheads if part["what"] == name), None)
            numbers = (None, None) if part is None else (part["ms"], part["part"])
            values += [
                "-" if number is None else f"{number:{form}}"
                for number, form in zip(numbers, (".3f", ".2%"), strict=True)
            ]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def aims(rows: Sequence[Row]) -> list[str]:
    """What was aimed for and what came out; left out where a part was not measured."""

    def speed(group: str, model: str) -> float | None:
        found = [row.tokens_per_second for row in rows if row.group == group and row.model.split()[0] == model]
        return max((value for value in found if value is not None), default=None)

    lines = []
    for group, tokens, rivals in (
        ("50m", 1.8e6, {"mamba2": 6.0, "transformer": 1.5}),
        ("400m", 170e3, {"mamba2": 3.5}),
    ):
        ours = speed(group, "e1")
        if ours is None:
            continue
        lines.append(f"{_met(ours >= tokens)}: e1, {group}: {ours:,.0f} tokens/s, aim {tokens:,.0f}")
        for rival, factor in rivals.items():
            theirs = speed(group, rival)
            if theirs is not None:
                lines.append(
                    f"{_met(ours >= factor * theirs)}: e1, {group}: {ours / theirs:.2f} × {rival}, aim {factor}"
                )
    for row in rows:
        for part in row.overheads:
            if part["part"] is not None:
                cost = f"{part['what']} {part['part']:.2%}"
                lines.append(f"{_met(part['part'] < 0.01)}: {row.model}, {row.group}: {cost}, aim < 1%")
    return lines


def _met(yes: bool) -> str:
    return "met" if yes else "MISSED"


def main(options: Options, settings: Sequence[Setting] = SETTINGS) -> list[Row]:
    """Measure, print and write."""
    started = time.perf_counter()
    console = Console(width=220, highlight=False, markup=False, soft_wrap=True)
    device = resolve_device(options.device)
    rows: list[Row] = []
    facts = {"machine": machine(device, options.commit), "seq_len": options.seq_len, "steps": options.steps}

    def tell(row: Row) -> None:
        seconds = time.perf_counter() - started
        known = (
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f} tokens/s, {row.peak_gib:.1f} GiB"
        )
        console.print(f"{seconds:4.0f} s  {row.model}, {row.group}, B = {row.batch_size}: {known} {row.note}")
        written = {**facts, "seconds": round(seconds, 1), "rows": [asdict(each) for each in (*rows, row)]}
        write_json(f"train_step-{device_slug(device)}.json", written, RESULTS, options.out)

    with random_bytes() as data:
        for setting in settings:
            if setting.group not in options.groups:
                continue
            if time.perf_counter() - started < options.time_limit:
                row = measure(setting, options, data, tell)
            else:
                row = Row(setting.label, setting.group, setting.batch_size, note="not measured: out of time")
            tell(row)
            rows.append(row)
    console.print(f"\nT = {options.seq_len}, medians of up to {options.steps} steps\n\n{speed_table(rows)}\n")
    if any(row.shares for row in rows):
        console.print(f"{share_table(rows)}\n")
    if any(row.overheads for row in rows):
        console.print(f"{overhead_table(rows)}\n")
    for line in aims(rows):
        console.print(line)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""What a study declares: its question, its runs, and what all of them have in common.

Whatever a study does not name among ``varies`` is held equal, and a run that departs from it is an error: so what
``held_equal`` tells is what the runs are, not what somebody meant them to be.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from elman.errors import UsageError
from elman.evaluation.tasks import find_task
from elman.mixers import MixerConfig, pattern_mixers
from elman.model import ModelConfig
from elman.options import flag
from elman.sizing import TOLERANCE, flops_per_token, size_model
from elman.training.config import MAX_LR, RunConfig, TaskConfig, TrainConfig
from elman.units import format_count, format_duration, parse_count, parse_duration

BudgetKind = Literal["time", "tokens", "flops"]
#: What the runs of a study may be drawn against.
Axis = Literal["params", "depth", "batch_size", "peak_memory_bytes"]

#: Options of ``elman train`` that a study may set for all its runs: such as change what is learned, or how fast.
_SHARED = frozenset(
    ("sampling", "tokenizer", "seq_len", "batch_size", "grad_accum", "weight_init", "optimizer", "warmup", "schedule",
     "weight_decay", "grad_clip", "max_skipped", "heldout", "eval_bytes", "eval_multiples",
     "eval_examples", "precision", "compile", "graph")
)  # fmt: skip
#: Beside them, what a study may be about.
_VARIABLE = _SHARED | {"params", "task"}

#: Those of them that are told as they are.
_TRAINING = ("weight_init", "optimizer", "schedule", "warmup", "weight_decay", "grad_clip", "precision", "sampling")

#: Those that a sweep may choose beside the learning rate: such as leave all alike what is learned from and judged by.
_SWEPT = frozenset(("weight_init", "optimizer", "schedule", "warmup", "weight_decay", "grad_clip"))

#: The seed of every sweep: the same whatever seeds a study has, which may be more another day, and none of theirs.
SWEEP_SEED = 1000

#: Warm-up where a study says nothing of it: a part of the budget, since of a number of steps a slow model has few.
WARMUP = 0.05

T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """The size that a study is run at: ``full``, or ``tiny`` to try it on two CPU cores in minutes."""

    name: Literal["full", "tiny"] = "full"

    def __call__(self, full: T, tiny: T) -> T:
        """The one of the two values that this scale takes."""
        return full if self.name == "full" else tiny


@dataclass(frozen=True)
class Run:
    """One row of a study's table: a model, run with each seed.

    Attributes:
        name: what the table calls it; unique in the study.
        model: a variant, or a pattern of them, as for ``elman train --model``.
        options: of the variant; of a pattern by ``variant.option``.
        params: parameters to be within 2% of; the study's if absent.
        dim, depth: as for ``elman train``; solved for where absent.
        train: options of ``elman train`` in which this run differs; only such as the study ``varies``.
        series: runs of one series are joined by a line where loss is drawn against a scale; the model's if empty. In a
            study of tasks it is a row of the table, and the task a column.
        task: a synthetic task to learn, as for ``elman task``, in place of a text.
    """

    name: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    params: str | None = None
    dim: int | None = None
    depth: int | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    series: str = ""
    task: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not slug(self.name):
            raise UsageError(f"a run is named {self.name!r}: give a name with a letter or a digit in it")

    @property
    def names(self) -> frozenset[str]:
        """By which it may be asked for: its own, its series' and its task's."""
        return frozenset(name for name in (self.name, self.series, self.task) if name)

    def mixers(self) -> tuple[MixerConfig, ...]:
        """The variants with their options.

        Raises:
            UsageError: no such variant, or no such option; the nearest are named.
        """
        mixers = pattern_mixers(self.model)
        by_name = {mixer.name: mixer for mixer in mixers}
        given: dict[str, dict[str, Any]] = {name: {} for name in by_name}
        for key, value in self.options.items():
            name, _, option = key.rpartition(".")
            if not name and len(given) == 1:
                name = mixers[0].name
            if name not in given:
                expected = " or ".join(f"{other}.{option}" for other in given)
                raise UsageError(f"run {self.name!r} gives option {key!r}, but its model is {self.model}: {expected}")
            known = [entry.name for entry in dataclasses.fields(by_name[name]) if entry.init]
            if option not in known:
                raise UsageError(f"run {self.name!r} gives {name} an {_unknown('option', option, known)}")
            given[name][option] = value
        return tuple(dataclasses.replace(mixer, **given[mixer.name]) for mixer in mixers)


@dataclass(frozen=True)
class Setting:
    """What a sweep tries, and chooses for each run: a learning rate, and the options that it sweeps beside it."""

    lr: float
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return ", ".join((f"lr {self.lr:g}", *(f"{name} {value}" for name, value in self.options)))


@dataclass(frozen=True)
class Budget:
    """Where every run of a comparison ends: at equal training time (s), tokens, or training FLOPs."""

    kind: BudgetKind
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in ("time", "tokens", "flops") or not 0 < self.amount < math.inf:
            raise UsageError(f"a budget of {self.amount} {self.kind} is none: give a positive time, tokens or flops")

    def part(self, part: float) -> Budget:
        """A part of it, 0 to 1."""
        return Budget(self.kind, self.amount * part)

    def end(self, model: ModelConfig, seq_len: int, batch_size: int) -> dict[str, Any]:
        """The options of ``elman train`` that end this model's run there: a time, or the nearest number of steps."""
        if self.kind == "time":
            return {"time_limit": f"{self.amount:.6g}s", "steps": None}
        tokens = self.amount
        if self.kind == "flops":
            tokens /= 3 * flops_per_token(model, seq_len)
        return {"steps": max(1, round(tokens / (seq_len * batch_size))), "time_limit": None}

    def __str__(self) -> str:
        match self.kind:
            case "time":
                return f"{format_duration(self.amount)} of training"
            case "tokens":
                return f"{format_count(self.amount)} tokens"
            case "flops":
                return f"{self.amount:.3g} training FLOPs"

    @property
    def short(self) -> str:
        """For names of folders: ``time600s``."""
        unit = "s" if self.kind == "time" else ""
        return f"{self.kind}{self.amount:.6g}{unit}".replace("+", "")


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        name: as in ``elman study run NAME``.
        question: what it shall answer, one sentence.
        runs: the rows of its table, the first being the one that the others are measured against.
        params: parameters that every run must be within 2% of; None where the study ``varies`` them.
        time_limit, tokens, flops: where the runs end, for each way of holding the budget equal that the study offers.
        budget: which of these, where the command line names none.
        seeds: each run is trained once with each of them.
        learning_rates: each run's is chosen among these by the sweep; where there is one, there is no sweep.
        sweep: options of ``elman train`` that the sweep chooses for each run beside its rate, and the values that it
            tries, such as ``{"warmup": (0.05, 0.2)}``: every value with every rate, which takes so many times the runs.
        sweep_part: the part of the budget that a run of the sweep has. A shorter run is best at a higher rate than a
            whole one, so less than all of it saves time and misleads.
        sweep_beyond: how many rates the sweep may try beyond the ends of ``learning_rates``: while a run's best is the
            lowest or the highest so far, the next one there, as far away as its neighbour, with what else is best.
        train: options of ``elman train`` for all runs; where it has no ``warmup``, that is ``WARMUP`` of the budget.
        varies: what the study is about: options in which its runs may differ, and ``params``.
        axis: what loss is drawn against, where the study is about that.
        memory: bytes that every run may take; each takes the largest batch that fits. Needs ``batch_size`` among
            ``varies``.
        notes: what a reader should know of it, one sentence each.
    """

    name: str
    question: str
    runs: tuple[Run, ...]
    params: str | None = None
    time_limit: str | None = "10m"
    tokens: float | None = None
    flops: float | None = None
    budget: BudgetKind = "time"
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    sweep: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    sweep_part: float = 1.0
    sweep_beyond: int = 0
    train: Mapping[str, Any] = field(default_factory=dict)
    varies: tuple[str, ...] = ()
    axis: Axis | None = None
    memory: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("name", self.name), ("question", self.question)):
            if not isinstance(value, str) or not value.strip():
                raise UsageError(f"a study's {name} is {value!r}: give it one")
        if Path(self.name).name != self.name:
            raise self._wrong("its runs lie in a folder of this name: give one without a /")
        if not self.runs:
            raise self._wrong("it has no runs: give at least one Run")
        _check_distinct(self, "run", (run.name for run in self.runs))
        _check_distinct(self, "run", (slug(run.name) for run in self.runs))
        _check_distinct(self, "seed", self.seeds)
        _check_distinct(self, "learning rate", self.learning_rates)
        if not self.seeds or not self.learning_rates:
            raise self._wrong("it needs at least one of seeds and one of learning_rates")
        if SWEEP_SEED in self.seeds:
            raise self._wrong(f"seed {SWEEP_SEED} is that of the sweep: give another")
        if not 0 < self.sweep_part <= 1:
            raise self._wrong(f"sweep_part {self.sweep_part} is out of range: give a number above 0 and up to 1")
        if type(self.sweep_beyond) is not int or self.sweep_beyond < 0:
            raise self._wrong(
                f"sweep_beyond {self.sweep_beyond!r} (--sweep-beyond) is out of range: give a number, 0 or more"
            )
        if self.sweep_beyond and len(self.learning_rates) == 1:
            raise self._wrong(
                f"sweep_beyond {self.sweep_beyond} (--sweep-beyond) needs two learning rates: give more, or 0"
            )
        if self.memory is not None and not (isinstance(self.memory, int | float) and 0 < self.memory < math.inf):
            raise self._wrong(f"memory {self.memory!r} is out of range: give bytes, such as 8 * 2**30")
        notes: object = self.notes
        if not isinstance(notes, tuple | list) or not all(isinstance(note, str) for note in notes):
            raise self._wrong(f"notes {notes!r} are none: give a tuple of sentences")
        if len({run.task is None for run in self.runs}) > 1:
            raise self._wrong("some of its runs learn a task and some a text: make two studies of them")
        if len({run.task for run in self.runs}) > 1 and "task" not in self.varies:
            raise self._wrong("its runs learn several tasks: name task among varies")
        if self.is_of_tasks and self.memory is not None:
            raise self._wrong("equal memory is for studies of a text: leave it out")
        shared = _SHARED & {entry.name for entry in dataclasses.fields(self._kind)}
        for option in self.train:
            if option not in shared:
                raise self._wrong(_unknown("option of train,", option, shared))
        for option, values in self.sweep.items():
            if option not in _SWEPT:
                raise self._wrong(_unknown("option to sweep,", option, _SWEPT))
            if option in self.varies:
                raise self._wrong(
                    f"it is about {option}, so its sweep cannot choose it: leave it out of sweep or varies"
                )
            _check_distinct(self, option, values)
            if not values:
                raise self._wrong(f"its sweep has no {option} to choose: give at least one value")
        for option in self.varies:
            if option not in _VARIABLE:
                raise self._wrong(_unknown("option among varies,", option, _VARIABLE))
        if self.memory is not None and "batch_size" not in self.varies:
            raise self._wrong("equal memory means unequal batches: give batch_size among varies")
        for run in self.runs:
            self._check_run(run)
        _ = self.budget_of(self.budget)
        for setting in self.settings:
            # For its errors alone: a wrong value among the shared options, or among those that are swept.
            self.config(self.runs[0], setting, self.seeds[0], steps=1)

    def _check_run(self, run: Run) -> None:
        for option in run.train:
            if option not in _SHARED:
                raise self._wrong(f"run {run.name!r}: " + _unknown("option of train,", option, _SHARED))
            if option not in self.varies:
                raise self._wrong(f"run {run.name!r} differs in {option}, which the study does not name among varies")
        if run.params is not None and "params" not in self.varies:
            raise self._wrong(f"run {run.name!r} has a size of its own: name params among varies, or leave it out")
        if self.target(run) is None and run.dim is None:
            raise self._wrong(f"run {run.name!r} has no size: give params or dim")
        run.mixers()

    @property
    def is_of_tasks(self) -> bool:
        """Whether its runs learn tasks, not a text."""
        return self.runs[0].task is not None

    @property
    def _kind(self) -> type[RunConfig]:
        return TaskConfig if self.is_of_tasks else TrainConfig

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"study {self.name}: {what}")

    def target(self, run: Run) -> int | None:
        """Parameters that the run must be within 2% of; None where nothing is said of them."""
        text = run.params or self.params
        return None if text is None else parse_count(text, f"study {self.name}, run {run.name!r}: params")

    def model(self, run: Run, vocab_size: int | None = None) -> ModelConfig:
        """The model of a run, of so many tokens; if absent, as many as its task has, or 256.

        Raises:
            UsageError: no such size comes within 2% of the run's parameters.
        """
        if vocab_size is None:
            vocab_size = 256 if run.task is None else find_task(run.task).vocab_size
        return size_model(
            run.mixers(), params=self.target(run), dim=run.dim, depth=run.depth, vocab_size=vocab_size
        )  # fmt: skip

    def options(self, run: Run) -> dict[str, Any]:
        """The options of ``elman train`` that the study and the run give."""
        return {**self.train, **run.train}

    @functools.cached_property
    def settings(self) -> list[Setting]:
        """What the sweep tries of every run; where it is one, there is no sweep."""
        names = list(self.sweep)
        return [
            Setting(lr, tuple(zip(names, values, strict=True)))
            for values in itertools.product(*self.sweep.values())
            for lr in self.learning_rates
        ]

    def setting_beyond(self, best: Setting, rates: Iterable[float]) -> Setting | None:
        """What to try where the best of these rates is at their end; None where it is not, or nothing lies beyond."""
        low, *_, high = ordered = sorted(set(rates))
        neighbour = {low: ordered[1], high: ordered[-2]}.get(best.lr)
        if neighbour is None:
            return None
        lr = float(f"{best.lr**2 / neighbour:.3g}")
        return dataclasses.replace(best, lr=lr) if lr not in ordered and 0 < lr < MAX_LR else None

    def setting_of(self, config: RunConfig) -> Setting:
        """That of a run."""
        return Setting(config.lr, tuple((name, getattr(config, name)) for name in self.sweep))

    def config(self, run: Run, setting: Setting, seed: int, **more: Any) -> RunConfig:
        """A run's options, but for its size, which ``model`` tells."""
        own: dict[str, Any] = {"model": run.model, "lr": setting.lr, "seed": seed, "eval_every": 0, "warmup": WARMUP}
        options = {**own, **self.options(run), **dict(setting.options), **more}
        return TrainConfig(**options) if run.task is None else TaskConfig(task=run.task, **options)

    def budget_of(self, kind: BudgetKind) -> Budget:
        """The study's own budget of a kind.

        Raises:
            UsageError: it has none; how to give one is told.
        """
        match kind:
            case "time" if self.time_limit is not None:
                return Budget("time", parse_duration(self.time_limit, f"study {self.name}: time_limit"))
            case "tokens" if self.tokens is not None:
                return Budget("tokens", self.tokens)
            case "flops" if self.flops is not None:
                return Budget("flops", self.flops)
        option = {"time": "--time-limit 10m", "tokens": "--tokens 100m", "flops": "--flops 1e17"}[kind]
        raise UsageError(f"study {self.name} declares no equal {kind}: say how much, such as {option}")

    def held_equal(self, budget: Budget) -> list[str]:
        """What all its runs have in common, in words."""
        same = self.config(self.runs[0], self.settings[0], self.seeds[0], steps=1)
        lines = [f"budget: {budget} (compiling, evaluation and saving do not count)"]
        if "params" not in self.varies and self.params is not None:
            lines.append(f"parameters: counted, within {TOLERANCE:.0%} of {self.params}")
        elif any(self.target(run) is not None for run in self.runs):
            lines.append(f"parameters: counted, within {TOLERANCE:.0%} of what each run is meant to have")
        if self.memory is not None:
            lines.append(f"memory: each run's largest batch that fits {self.memory / 2**30:.3g} GiB")
        what = "examples" if isinstance(same, TaskConfig) else "windows"
        if "batch_size" not in self.varies:
            lines.append(f"batch: {same.batch_size} {what} a step")
        if "seq_len" not in self.varies:
            length = f"{same.seq_len} {'bytes' if getattr(same, 'tokenizer', None) is None else 'tokens'}"
            lines.append(f"window: {length}" if isinstance(same, TrainConfig) else f"length: {same.seq_len} or less")
        if isinstance(same, TrainConfig):
            lines.append(f"text: one file, the same held-out part of it, {same.eval_bytes} of that read at the end")
        if isinstance(same, TaskConfig):
            lengths = ", ".join(map(str, same.lengths))
            lines.append(f"judged by: the same {same.eval_examples} examples of each length, {lengths}")
        own = {*self.varies, *self.sweep}
        training = {name: getattr(same, name) for name in _TRAINING if name not in own and hasattr(same, name)}
        lines.append("training: " + ", ".join(f"{flag(name)} {value}" for name, value in training.items()))
        rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
        if len(self.settings) > 1:
            budget_part = "the whole budget" if self.sweep_part == 1 else f"{self.sweep_part:.0%} of the budget"
            swept = {"learning rate": rates}
            swept |= {flag(name): ", ".join(map(str, values)) for name, values in self.sweep.items()}
            lines.append(
                f"{' and '.join(swept)}: each run's own, the best of {', each with '.join(swept.values())} by the last "
                f"100 training losses of a run of {budget_part} with a seed of its own"
                + (f"; up to {self.sweep_beyond} more beyond, where the best is at an end" if self.sweep_beyond else "")
            )
        else:
            lines.append(f"learning rate: {rates}")
        fixed = "the weights and " + ("the examples" if self.is_of_tasks else "the order of the data")
        lines.append(f"seeds: {', '.join(map(str, self.seeds))}, which fix {fixed}")
        return lines


def over_tasks(runs: Iterable[Run], tasks: Iterable[str]) -> tuple[Run, ...]:
    """Each of the runs with each of the tasks, named ``RUN on TASK``; the run's own name is that of the series."""
    runs = tuple(runs)
    return tuple(
        dataclasses.replace(run, name=f"{run.name} on {task}", series=run.name, task=task)
        for task in tasks
        for run in runs
    )


def slug(name: str) -> str:
    """A name as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name.replace("×", "x")).strip("-.").lower()


def _unknown(kind: str, value: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, sorted(known), n=2, cutoff=0.5) or sorted(known)
    return f"{kind} {value!r}, that is unknown: choose one of {', '.join(near)}"


def _check_distinct(study: Study, kind: str, values: Iterable[Any]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise UsageError(f"study {study.name}: two of its {kind}s are {value!r}: give each a value of its own")
        seen.add(value)

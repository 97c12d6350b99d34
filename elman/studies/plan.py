"""From a study to jobs: which runs there are, where each lies, and what has become of it.

A run's folder is named by what it computes: ``NAME-BUDGET-lrRATE-seedSEED-DIGEST``, the digest being that of all
options and of the text. So a run that is there is the run that is meant, or has another name, and running a study again
goes on with what was cut and leaves alone what is done. What a report needs to know of the study lies in each of its
folders, in ``study.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from elman.data.bytes import open_bytes
from elman.data.vocabulary import open_vocabulary
from elman.environment import resolve_device
from elman.errors import UsageError
from elman.evaluation.tasks import find_task
from elman.model import ModelConfig
from elman.studies.job import TrainJob
from elman.studies.study import SWEEP_SEED, Budget, Run, Scale, Setting, Study, slug
from elman.training.config import RunConfig
from elman.training.run import RunFolder

#: Options of ``elman train`` that change neither what a run computes nor how fast it trains, or that the model tells.
NOT_IDENTITY = frozenset(
    ("model", "params", "dim", "depth", "data", "out", "resume", "device", "workers", "eval_every", "save_every",
     "profile", "stats_every", "tensorboard", "wandb")
)  # fmt: skip

#: What of a study.json, beside the settings, decides which run it is.
_SEALED = ("run", "role", "budget", "target_params", "fingerprint")

Role = Literal["sweep", "final"]
State = Literal["new", "cut", "done", "busy", "damaged"]


def identity(config: RunConfig, model: ModelConfig, fingerprint: str) -> str:
    """Ten hexadecimal digits by which a run is known: of its options, its model and its text.

    Options at their defaults are left out, so that one which elman gains later changes no name; a default that changes
    makes other runs, with other names.
    """
    # As JSON has them: it has no tuples.
    defaults = {
        entry.name: list(entry.default) if isinstance(entry.default, tuple) else entry.default
        for entry in dataclasses.fields(config)
    }
    found = settings(config, model)
    train = {name: value for name, value in found["train"].items() if value != defaults[name]}
    for options, mixer in zip(found["model"]["mixers"], model.mixers, strict=True):
        plain = {entry.name: entry.default for entry in dataclasses.fields(mixer)}
        for name in [name for name, value in options.items() if name in plain and value == plain[name]]:
            del options[name]
    return _digest(train, found["model"], fingerprint)[:10]


def settings(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """All that decides what a run computes, as config.json writes it, for study.json to hold beside it."""
    train = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IDENTITY}
    plain: dict[str, Any] = json.loads(json.dumps({"train": train, "model": model.to_dict()}, default=str))
    return plain


def seal(facts: Mapping[str, Any]) -> str:
    """By which it is seen that a study.json is as it was written."""
    run, role, budget, target, fingerprint = map(facts.get, _SEALED)
    return _digest(run, role, budget, target, facts.get("settings"), fingerprint)


def what_was_changed(path: Path, facts: Mapping[str, Any]) -> str | None:
    """In words, what differs in the config.json of a study's run from what its study.json says it was begun with."""
    if seal(facts) != facts.get("seal"):
        return "its study.json was changed after it was written"
    # As it is written there: what a later elman would make of it does not matter.
    values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    begun = facts["settings"]
    for name, value in begun["train"].items():
        if values["train"].get(name) != value:
            return f"its config.json says {name} {values['train'].get(name)}, and it was begun with {value}"
    if values["model"] != begun["model"]:
        return "its config.json has another model than it was begun with"
    return None


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Row:
    """A run of the plan, sized; or refused, and why."""

    run: Run
    model: ModelConfig | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Plan:
    """A study with its budget, its text and its place.

    Attributes:
        data: the text; None for a study of tasks.
        folder: of the study; its runs lie in ``runs``, those of the sweep in ``sweep``.
        device: as for ``elman train``; None where the runs go to other machines.
        batches: each run's batch, where the study holds memory equal and they have been found.
        only: names of the runs to train now, of their series or tasks; all if empty.
        refusals: runs that are refused beside those whose size or path is wrong, and why.
    """

    study: Study
    scale: Scale
    budget: Budget
    folder: Path
    data: Path | None
    device: str | None = "auto"
    batches: Mapping[str, int] = field(default_factory=dict)
    only: frozenset[str] = frozenset()
    refusals: Mapping[str, str] = field(default_factory=dict)

    def fingerprint(self, run: Run) -> str:
        """Of the text, or of the run's task."""
        return self._text_fingerprint if run.task is None else find_task(run.task).fingerprint

    @functools.cached_property
    def _text_fingerprint(self) -> str:
        assert self.data is not None
        return open_bytes(self.data, self.study.options(self.study.runs[0]).get("heldout", 0.05)).fingerprint()

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Every run, sized or refused."""
        return [self._size(run) for run in self.study.runs]

    @property
    def accepted(self) -> list[Row]:
        """The rows to train: not refused, and asked for."""
        return [row for row in self.rows if row.model is not None and (not self.only or self.only & row.run.names)]

    def _size(self, run: Run) -> Row:
        if run.name in self.refusals:
            return Row(run, refused=self.refusals[run.name])
        # Whose speed is not asked for may run on any path.
        speed_counts = self.device is not None and run.task is None
        try:
            tokenizer = self.study.options(run).get("tokenizer")
            model = self.study.model(run, None if tokenizer is None else open_vocabulary(tokenizer).size)
            reason = slow_path(model, resolve_device(self.device or "auto")) if speed_counts else None
        except UsageError as error:
            return Row(run, refused=str(error))
        return Row(run, refused=reason) if reason is not None else Row(run, model)

    def config(self, row: Row, setting: Setting, seed: int, part: float = 1.0) -> RunConfig:
        """The options of a run, its size and its end among them."""
        assert row.model is not None
        study, run = self.study, row.run
        more: dict[str, Any] = {"device": self.device or "auto", "tensorboard": "off"}
        if run.task is None:
            more["data"] = self.data
        plain = study.config(run, setting, seed, steps=1, **more)
        if run.name in self.batches:
            plain = replace(plain, batch_size=self.batches[run.name])
        end = self.budget.part(part).end(row.model, plain.seq_len, plain.batch_size)
        size: dict[str, Any] = {"params": run.params or study.params, "dim": row.model.dim, "depth": row.model.depth}
        return replace(plain, **size, **end)

    def job(self, row: Row, role: Role, setting: Setting, seed: int) -> TrainJob:
        """One training."""
        assert row.model is not None
        part = self.study.sweep_part if role == "sweep" else 1.0
        config = self.config(row, setting, seed, part)
        fingerprint = self.fingerprint(row.run)
        digest = identity(config, row.model, fingerprint)
        budget = self.budget.part(part)
        name = f"{slug(row.run.name)}-{budget.short}-lr{setting.lr:g}-seed{seed}-{digest}"
        folder = self.folder.absolute() / ("sweep" if role == "sweep" else "runs") / name
        facts = {
            **self.facts,
            "role": role,
            "run": row.run.name,
            "series": row.run.series or row.run.model,
            "target_params": self.study.target(row.run),
            "fingerprint": fingerprint,
            "identity": digest,
            "settings": settings(config, row.model),
        }
        facts["seal"] = seal(facts)
        return TrainJob(f"{row.run.name}, {setting}, seed {seed}", replace(config, out=folder), row.model, facts)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What study.json tells of the study, the same in each of its folders."""
        study = self.study
        return {
            "study": study.name,
            "scale": self.scale.name,
            "question": study.question,
            "held_equal": study.held_equal(self.budget),
            "varies": list(study.varies),
            "axis": study.axis,
            "notes": list(study.notes),
            "memory": study.memory,
            "budget": dataclasses.asdict(self.budget),
            "seeds": list(study.seeds),
            "learning_rates": list(study.learning_rates),
            "sweep": {name: list(values) for name, values in study.sweep.items()},
            "sweep_part": study.sweep_part,
            "planned": [row.run.name for row in self.rows],
            "planned_series": list(dict.fromkeys(row.run.series or row.run.model for row in self.rows)),
            "refused": {row.run.name: row.refused for row in self.rows if row.refused is not None},
        }

    def sweep_job(self, row: Row, setting: Setting) -> TrainJob:
        """One that helps to choose a run's setting."""
        return self.job(row, "sweep", setting, SWEEP_SEED)

    def declared_sweep(self, row: Row) -> list[TrainJob]:
        """What is tried of a run at any rate; nothing where there is no choice."""
        settings = self.study.settings
        return [self.sweep_job(row, setting) for setting in settings] if len(settings) > 1 else []

    def final_jobs(self, chosen: Mapping[str, Setting]) -> list[TrainJob]:
        """Those that are compared, whose setting is known; seed by seed, so that all models get on alike."""
        return [
            self.job(row, "final", chosen[row.run.name], seed)
            for seed in self.study.seeds
            for row in self.accepted
            if row.run.name in chosen
        ]


def slow_path(model: ModelConfig, device: torch.device) -> str | None:
    """Why a model's speed would say nothing of it on a GPU; None where it runs as it is meant to, or on a CPU."""
    if device.type != "cuda":
        return None
    for mixer in model.mixers:
        if getattr(mixer, "kernels", None) == "torch":
            return f"--kernels torch runs {mixer.name} on a slow path: leave it out"
        try:
            mixer.check_device(device)
        except UsageError as error:
            return str(error)
    return None


def job_state(job: TrainJob) -> tuple[State, str]:
    """What has become of a job's run, and a word on it."""
    run = RunFolder(job.folder)
    if not job.folder.exists() or all(inside.name == ".lock" for inside in job.folder.iterdir()):
        return "new", ""
    remove = f"remove {job.folder}, or put back what it was"
    if not (job.folder / "config.json").is_file():
        # Made, but killed before its first file was whole: nothing was trained.
        return "damaged", f"it has no config.json: {remove}"
    try:
        config, model = run.read_config()
        facts = run.read_json("study.json")
        summary = run.read_json("summary.json")
    except UsageError as error:
        return "damaged", f"{error}"
    if not isinstance(facts, dict) or facts.get("seal") != seal(facts):
        return "damaged", f"its study.json is not as it was written: {remove}"
    if (changed := what_was_changed(job.folder, facts)) is not None:
        return "damaged", f"{changed}: {remove}"
    for name in _SEALED:
        if facts.get(name) != job.facts[name]:
            told = f"it was begun for {name} {facts.get(name)}, and the study has {job.facts[name]} now"
            return "damaged", f"{told}: give the study another --folder, or remove {job.folder}"
    # Not the settings as they lie there: an elman before this one knew of fewer.
    if identity(config, model, job.facts["fingerprint"]) != job.facts["identity"]:
        return "damaged", f"it is another run, whose folder was renamed: {remove}"
    if summary is not None:
        return ("done", "") if isinstance(summary, dict) else ("damaged", f"its summary.json is no summary: {remove}")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(run.lock())
        except UsageError as error:
            return "busy", str(error)
    return "cut", ""

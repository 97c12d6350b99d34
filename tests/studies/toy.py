"""A study of two small models, and a launcher that runs it in this process."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from elman.studies.launch import Done, Job, Launcher
from elman.studies.plan import Plan
from elman.studies.runner import run_plan
from elman.studies.study import Budget, Run, Scale, Study

RUNS = (Run("E1", "e1", dim=16, depth=1), Run("soft sign", "e15", dim=16, depth=1))


class Here(Launcher):
    """Runs jobs in this process, one behind the other; ``fails`` are labels of jobs that fail before they begin."""

    def __init__(self, fails: Sequence[str] = ()) -> None:
        self.fails = fails
        self.ran: list[str] = []

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        for job in jobs:
            self.ran.append(job.label)
            fails = job.label in self.fails
            done(job, 1 if fails else job(), "the machine burnt down" if fails else "")


def study(**more: Any) -> Study:
    train = {"batch_size": 4, "seq_len": 16, "warmup": 1, "eval_bytes": "200"}
    given: dict[str, Any] = {
        "name": "toy", "question": "Which?", "runs": RUNS, "train": train, "seeds": (0, 1),
        "learning_rates": (1e-3, 1e-2), "sweep_part": 0.25,
    }  # fmt: skip
    return Study(**{**given, **more})


def plan(tmp_path: Path, text: Path, made: Study | None = None, tokens: float = 512) -> Plan:
    return Plan(made or study(), Scale(), Budget("tokens", tokens), tmp_path / "toy", text, "cpu")


def run(made: Plan, launcher: Launcher | None = None) -> tuple[int, str]:
    out = io.StringIO()
    code = run_plan(made, launcher or Here(), Console(file=out, width=300))
    return code, out.getvalue()

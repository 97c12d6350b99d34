"""A task as a run reads it: examples drawn for every step, and its accuracy in longer ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from rich.console import RenderableType
from rich.table import Table

from elman.data.sampling import Batch
from elman.errors import UsageError
from elman.evaluation.accuracy import Accuracy, measure
from elman.evaluation.tasks import Task, find_task
from elman.model import IGNORED
from elman.sizing import num_params
from elman.training.config import TaskConfig
from elman.training.plot import plot_accuracies
from elman.training.run import RunFolder
from elman.training.source import Outcome, Source
from elman.units import format_count

if TYPE_CHECKING:
    from elman.training.loop import Trainer


@dataclass(frozen=True)
class TaskSampler:
    """The examples of every step, a function of the seed and the step.

    Those of a step have one length: ``seq_len``, or where the task asks for random ones a length drawn uniformly from
    the shortest up, and then positions up to ``seq_len`` that do not count.
    """

    task: Task
    seq_len: int
    batch_size: int
    seed: int

    resets: ClassVar[bool] = False
    carries_state: ClassVar[bool] = False

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of a step's batch that fall to a rank."""
        generator = np.random.Generator(np.random.Philox(key=(self.seed, 0), counter=[0, 0, 0, step]))
        length = self.seq_len
        if self.task.random_lengths:
            length = int(generator.integers(self.task.shortest, self.seq_len, endpoint=True))
        examples = self.task.examples(generator, self.batch_size, length)
        rows = self.batch_size // world_size
        mine = slice(rank * rows, (rank + 1) * rows)
        tokens = np.zeros((rows, self.seq_len), dtype=np.int64)
        targets = np.full((rows, self.seq_len), IGNORED, dtype=np.int64)
        tokens[:, :length] = examples.tokens[mine]
        targets[:, :length] = np.where(examples.mask[mine], examples.targets[mine], IGNORED)
        return Batch(tokens, None, targets)


@dataclass(frozen=True)
class TaskOutcome(Outcome):
    """Accuracies, that at the training length first."""

    task: str
    accuracies: tuple[Accuracy, ...]

    @property
    def loss(self) -> float:
        return self.accuracies[0].nats

    def row(self) -> dict[str, float]:
        return {f"accuracy_{found.length}": found.accuracy for found in self.accuracies}

    def line(self) -> str:
        told = "  ".join(f"{found.accuracy:.1%} at length {found.length}" for found in self.accuracies)
        return f"accuracy {told}  (chance {self.accuracies[0].chance:.1%})"

    def summary(self) -> dict[str, Any]:
        return {"task": self.task, "accuracies": [asdict(found) for found in self.accuracies]}

    def facts(self) -> list[tuple[str, str]]:
        return []

    def table(self) -> Table:
        """A row a length."""
        table = Table(title=f"accuracy in {self.task}", title_justify="left")
        for column in ("length", "accuracy", "past the training length", "whole examples", "chance"):
            table.add_column(column, justify="right")
        for found in self.accuracies:
            beyond = "" if found.beyond is None else f"{found.beyond:.1%}"
            told = (f"{found.accuracy:.1%}", beyond, f"{found.whole:.1%}", f"{found.chance:.1%}")
            table.add_row(f"{found.length}", *told)
        return table


class TaskSource(Source):
    """The task that the options name."""

    unit = "answer"
    judge = "loss on examples of the training length"

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.task = find_task(config.task)
        self.fingerprint = self.task.fingerprint
        self.sampler = TaskSampler(self.task, config.seq_len, config.batch_size, config.seed)

    def describe(self) -> str:
        drawn = f"{self.task.shortest} to {self.config.seq_len}" if self.task.random_lengths else self.config.seq_len
        return f"{self.task.name}: {self.task.asks[:-1]}, in examples of length {drawn}"

    def check_vocabulary(self, size: int) -> None:
        if self.task.vocab_size != size:
            raise UsageError(
                f"TASK {self.task.name} has {self.task.vocab_size} tokens, but the model was made for {size}: "
                f"start a new run"
            )

    def check_fingerprint(self, begun_with: str) -> None:
        if begun_with != self.fingerprint:
            raise UsageError(
                f"TASK {self.task.name} is not what the run began with, in this version of elman: "
                f"resume with that version, or start a new run"
            )

    def workers(self, device: torch.device) -> int:
        # On a CPU they would take the cores of the model.
        return self.config.workers if device.type == "cuda" else 0

    def evaluate(self, trainer: Trainer, stop: Callable[[], bool], *, final: bool) -> TaskOutcome | None:
        """At all lengths in the end, at that of training before. Every rank reads all examples, which are few."""
        found = []
        for length in self.config.lengths if final else self.config.lengths[:1]:
            accuracy = measure(
                trainer.model,
                self.task,
                length,
                count=self.config.eval_examples,
                train_length=self.config.seq_len,
                batch_size=trainer.rows,
                device=trainer.device,
                autocast=trainer.autocast,
                stop=stop,
            )
            if accuracy is None:
                return None
            found.append(accuracy)
        return TaskOutcome(self.task.name, tuple(found))

    def leave(self, trainer: Trainer, outcome: Outcome) -> list[RenderableType]:
        assert isinstance(outcome, TaskOutcome)
        if trainer.processes.is_main:
            model = trainer.model_config
            title = f"{model.pattern}, {format_count(num_params(model))} parameters: {self.task.name}"
            plot_accuracies(outcome.accuracies, self.config.seq_len, title, trainer.run.path / "accuracy.png")
        return [outcome.table()]

    def farewell(self, run: RunFolder) -> list[str]:
        return [f"results in {run.path}: summary.json, metrics.jsonl, accuracy.png, loss.png, checkpoints/"]

"""What a run learns from and is judged by: a text, or a task. The loop asks it for batches, and for judgement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rich.console import RenderableType

from elman.data.sampling import Batches
from elman.data.streams import TokenStreams
from elman.training.config import RunConfig, TaskConfig, TrainConfig

if TYPE_CHECKING:
    from elman.training.loop import Trainer
    from elman.training.run import RunFolder


class Outcome(ABC):
    """What an evaluation found."""

    @property
    @abstractmethod
    def loss(self) -> float:
        """Nats a target; an evaluation of which it is not finite ends the run."""

    @abstractmethod
    def row(self) -> dict[str, float]:
        """For metrics.jsonl."""

    @abstractmethod
    def line(self) -> str:
        """For a reader."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """For summary.json."""

    @abstractmethod
    def facts(self) -> list[tuple[str, str]]:
        """Rows of the table that a run ends with."""


class Source(ABC):
    """A text, or a task, as one run reads it.

    Attributes:
        sampler: what its steps read.
        unit: what a target is called.
        fingerprint: by which it is seen that a run goes on with what it began with.
        judge: what its losses on other data than it trains on are called.
    """

    sampler: Batches | TokenStreams
    unit: str
    fingerprint: str
    judge: str

    @abstractmethod
    def describe(self) -> str:
        """In a line."""

    @abstractmethod
    def check_vocabulary(self, size: int) -> None:
        """A model of so many tokens fits.

        Raises:
            UsageError: it does not.
        """

    @abstractmethod
    def check_fingerprint(self, begun_with: str) -> None:
        """A run that began with this may go on.

        Raises:
            UsageError: it may not.
        """

    @abstractmethod
    def workers(self, device: torch.device) -> int:
        """Processes that shall make batches ahead."""

    @abstractmethod
    def evaluate(self, trainer: Trainer, stop: Callable[[], bool], *, final: bool) -> Outcome | None:
        """Judge a trainer's model, all ranks together; None once ``stop``, which is asked now and then, is true.

        ``final``: whether this is the end of the run.
        """

    @abstractmethod
    def leave(self, trainer: Trainer, outcome: Outcome) -> list[RenderableType]:
        """Write what the run's folder gets beside its summary. Called by all ranks.

        Returns:
            What a reader is shown of it.
        """

    @abstractmethod
    def farewell(self, run: RunFolder) -> list[str]:
        """Where the results of a finished run lie, and what may be done with them."""


def open_source(config: RunConfig) -> Source:
    """What a run of these options learns from.

    Raises:
        UsageError: it cannot be read, or is too small for them.
    """
    if isinstance(config, TaskConfig):
        from elman.training.task import TaskSource

        return TaskSource(config)
    from elman.training.text import TextSource

    assert isinstance(config, TrainConfig)
    return TextSource(config)

"""What a launcher runs in a process of its own, here or on another machine: it is pickled, called, and called again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elman.errors import TrainingError, UsageError
from elman.model import ModelConfig
from elman.text import one_line
from elman.training.config import RunConfig, TrainConfig
from elman.training.display import RunConsole
from elman.training.run import open_run
from elman.training.start import resume_run, start_run


@dataclass(frozen=True)
class TrainJob:
    """One training, begun or gone on with.

    Attributes:
        label: for people.
        config: with its folder as ``out``.
        model: the model, sized.
        facts: what its study.json tells.
    """

    label: str
    config: RunConfig
    model: ModelConfig
    facts: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Of the run."""
        assert self.config.out is not None
        return self.config.out

    @property
    def name(self) -> str:
        """Of its folder, unique among its study's."""
        return self.folder.name

    def __call__(self) -> int:
        """Train. Returns the exit code of ``elman train``; a mistake is printed as it prints it."""
        console = RunConsole(highlight=False, markup=False, emoji=False)
        try:
            if (self.folder / "config.json").exists():
                saved, model = open_run(self.folder).read_config()
                again = replace(saved, resume=self.folder, device=self.config.device)
                if isinstance(again, TrainConfig) and isinstance(self.config, TrainConfig):
                    again = replace(again, data=self.config.data)
                return resume_run(again, model.mixers, console)
            return start_run(self.config, self.model.mixers, console, self.facts)
        except (UsageError, TrainingError) as error:
            print(f"elman: {one_line(str(error))}", flush=True)
            return 2 if isinstance(error, UsageError) else 1

    def checkpoint(self) -> Any:
        """Called by submitit where the cluster takes the machine back: the same job, queued again, goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

"""A run is a folder: everything that is known of it lies there, and everything shown of it is read from there.

config.json     the options and the model, resolved
env.json        machine, versions, commit; one entry for each time the run was started
metrics.jsonl   a line a step (step, loss, lr, grad_norm, tokens, seconds) and a line an evaluation
summary.json    the outcome
sample.txt, loss.png
checkpoints/
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock

from elman.errors import UsageError
from elman.model import LanguageModel, ModelConfig
from elman.training.checkpoint import list_checkpoints, load_checkpoint
from elman.training.config import TrainConfig


@dataclass(frozen=True)
class RunFolder:
    """A run's files. Make one by ``create``, find one by ``open_run``."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from writing to the same run.

        Raises:
            UsageError: another process is writing to it.
        """
        lock = filelock.FileLock(self.path / ".lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UsageError(
                f"{self.path} is being written by another process: wait for it, or stop it first"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def read_config(self) -> tuple[TrainConfig, ModelConfig]:
        """What the run was started with.

        Raises:
            UsageError: config.json is missing or was not written by elman.
        """
        try:
            values = json.loads((self.path / "config.json").read_text())
            train = dict(values["train"])
            for name in ("data", "out", "resume"):
                train[name] = Path(train[name]) if train[name] is not None else None
            return TrainConfig(**train), ModelConfig.from_dict(values["model"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.path}/config.json is not the config of a run of elman train: {error}") from None

    def write_config(self, train: TrainConfig, model: ModelConfig) -> None:
        """Write config.json."""
        self.write_json("config.json", {"train": asdict(train), "model": model.to_dict()})

    def write_json(self, name: str, value: Any) -> None:
        """Replace a file at once, so that a reader never sees half of it."""
        partial = self.path / f".{name}.partial"
        partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
        partial.replace(self.path / name)

    def read_json(self, name: str) -> Any:
        """A file's value, or None where it is not there."""
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl."""
        with self.metrics_file.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl; one that a kill cut short is left out."""
        rows = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
        return rows

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run does again."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        partial = self.path / ".metrics.jsonl.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(self.metrics_file)


def create(path: Path) -> RunFolder:
    """Make a new run folder.

    Raises:
        UsageError: something is there already, or the folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        taken = next(path.iterdir(), None) is not None
    except FileExistsError:
        raise UsageError(f"--out {path} is a file: give the name of a folder to make") from None
    except OSError as error:
        raise UsageError(f"--out {path} cannot be made: {error.strerror or error}; give another folder") from None
    if (path / "config.json").exists():
        raise UsageError(
            f"--out {path} holds another run and is left as it is: "
            f"give another folder, or go on with that run by --resume {path}"
        )
    if taken:
        raise UsageError(f"--out {path} is not empty and is left as it is: give the name of a new folder")
    if not os.access(path, os.W_OK):
        raise UsageError(f"--out {path} cannot be written to: give another folder")
    return RunFolder(path)


def open_run(path: Path, option: str = "RUN") -> RunFolder:
    """An existing run folder.

    Raises:
        UsageError: there is none.
    """
    if not path.is_dir():
        raise UsageError(f"{option} {path}: no such folder; give the run folder that elman train printed")
    if not (path / "config.json").is_file():
        raise UsageError(f"{option} {path} is no run folder (it has no config.json): give one that elman train made")
    return RunFolder(path)


def newest_checkpoint(run: RunFolder) -> Path:
    """The run's latest checkpoint.

    Raises:
        UsageError: it has none.
    """
    found = list_checkpoints(run.checkpoints)
    if not found:
        raise UsageError(f"{run.path} has no checkpoint yet: it ended before its first save; start it again")
    return found[-1]


def load_model(path: Path) -> LanguageModel:
    """The model of a run folder at its newest checkpoint, on the CPU, in evaluation mode.

    Raises:
        UsageError: no run there, or its checkpoint is damaged.
    """
    run = open_run(path)
    _, config = run.read_config()
    checkpoint_path = newest_checkpoint(run)
    model = LanguageModel(config)
    load_weights(model, load_checkpoint(checkpoint_path, with_trainer=False).model, checkpoint_path)
    return model.eval()


def load_weights(model: LanguageModel, weights: dict[str, Any], source: Path) -> None:
    """Load weights that must fit the model to the letter.

    Raises:
        UsageError: names or shapes differ: the checkpoint is another model's.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        name = min(key for key in expected | found if expected.get(key) != found.get(key))
        raise UsageError(
            f"checkpoint {source} belongs to another model: {name} is {found.get(name, 'missing')} "
            f"but config.json asks for {expected.get(name, 'none')}; give the run folder it came with"
        ) from None

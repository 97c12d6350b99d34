"""What shows a run elsewhere while it goes: TensorBoard and Weights & Biases, both fed with the rows of metrics.jsonl.

metrics.jsonl is written first and is all that the run itself reads. A tracker gets every number of a row under its
name, those of a table under ``stats/NAME/LAYER``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

from elman.errors import UsageError
from elman.training.config import RunConfig
from elman.training.run import RunFolder

#: What every row has, and what is no measurement of its own.
_AXES = ("step",)


class Tracker(Protocol):
    """One of them, for one run."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step, by name. Must not wait for a disk or a network."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class Metrics:
    """The one place that rows go through: to metrics.jsonl, then to the trackers."""

    def __init__(self, run: RunFolder, trackers: list[Tracker]) -> None:
        self.run = run
        self.trackers = trackers

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows in the order of their steps."""
        self.run.append_metrics(rows)
        for row in rows:
            values = dict(flatten({name: value for name, value in row.items() if name not in _AXES}))
            for tracker in self.trackers:
                tracker.log(row["step"], values)


def flatten(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a row, each with its path: ``{"a": {"b": [1, None, 3]}}`` -> ``a/b/0``, 1 and ``a/b/2``, 3."""
    if isinstance(values, bool) or values is None:
        return
    if isinstance(values, int | float):
        yield name, values
        return
    parts = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in parts:
        yield from flatten(value, f"{name}/{key}" if name else str(key))


class TensorBoard:
    """Event files in the run's folder ``tensorboard``, written by a thread of their writer's."""

    def __init__(self, run: RunFolder, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a run did after its last checkpoint, it does again when it goes on: purging hides the first time.
        purge = first_step if first_step > 1 else None
        self._writer = SummaryWriter(run.path / "tensorboard", purge_step=purge, max_queue=1000)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, whose id lies in wandb.json, so that it goes on as the same one."""

    def __init__(self, run: RunFolder, project: str) -> None:
        wandb = _wandb(project)
        saved = run.read_json("wandb.json") or {}
        run_id = saved.get("id") if saved.get("project") == project else None
        run_id = run_id or uuid.uuid4().hex[:8]
        run.write_json("wandb.json", {"project": project, "id": run_id})
        self._run = wandb.init(
            project=project, id=run_id, resume="allow", name=run.path.name, dir=str(run.path),
            config=run.read_json("config.json"),
        )  # fmt: skip
        # Its own count of steps cannot go back, as a run that goes on from its last checkpoint does.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _wandb(project: str) -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UsageError(f"--wandb {project} needs its package ({error}): pip install wandb, or drop --wandb") from None


def uses_tensorboard(config: RunConfig) -> bool:
    """Whether a run is shown in TensorBoard: if it asks for it, or may have it and the package is there.

    Raises:
        UsageError: it asks for it, and the package is missing.
    """
    found = importlib.util.find_spec("tensorboard") is not None
    if config.tensorboard == "on" and not found:
        raise UsageError("--tensorboard on needs its package: pip install tensorboard, or give --tensorboard auto")
    return found and config.tensorboard != "off"


def check_trackers(config: RunConfig) -> None:
    """All that a run asks to be shown by is installed.

    Raises:
        UsageError: something is not.
    """
    uses_tensorboard(config)
    if config.wandb is not None:
        _wandb(config.wandb)


@contextlib.contextmanager
def open_metrics(run: RunFolder, config: RunConfig, first_step: int) -> Iterator[Metrics]:
    """The metrics of a run that begins with step ``first_step``, its trackers closed at the end."""
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        if uses_tensorboard(config) and run.writes:
            trackers.append(stack.enter_context(contextlib.closing(TensorBoard(run, first_step))))
        if config.wandb is not None and run.writes:
            trackers.append(stack.enter_context(contextlib.closing(WandB(run, config.wandb))))
        yield Metrics(run, trackers)

"""A run is a folder: everything that is known of it lies there.

config.json     the options and the model, resolved
env.json        machine, versions, commit; one entry for each time the run was started
metrics.jsonl   a line a step (step, loss, lr, grad_norm, tokens, seconds; now and then tokens_per_second and mfu) and
                a line an evaluation; a step that was skipped has what of it was finite, and under "skipped" how many
                there were so far; every --stats-every steps "stats", see statistics.py
summary.json    the outcome; of a task, its accuracies
study.json      of a run of a study: what the study asks, and which of its runs this is, see elman/studies/plan.py
sample.txt, loss.png; of a task, accuracy.png in place of a sample
checkpoints/
profile.json.gz             a trace, by --profile
eval-DATE-TIME/             what an `elman eval` found, see elman/evaluation/report.py
tensorboard/, wandb.json    where trackers show the same numbers, see tracking.py
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import re
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from elman.data.sampling import SAMPLERS
from elman.data.vocabulary import Vocabulary, open_vocabulary
from elman.environment import resolve_device
from elman.errors import UsageError
from elman.mixers import own
from elman.model import LanguageModel, ModelConfig
from elman.sizing import num_params
from elman.training.checkpoint import Checkpoint, DamagedCheckpointError, list_checkpoints, load_checkpoint, step_of
from elman.training.config import RunConfig, TaskConfig, TrainConfig
from elman.training.distributed import ALONE, Processes
from elman.training.parallel import Room

#: Copies of variants that are in no elman, in a run's folder.
OWN_VARIANTS = "variant-*.py"
#: Of the weights, that which every model has.
_EMBEDDING = "embedding.weight"
#: What a model computes in.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Above what is written to metrics.jsonl: numbers, and steps.
_MOST, _MOST_STEPS = 1e300, 2**53


@dataclass(frozen=True)
class RunFolder:
    """A run's files. Make one by ``create``, find one by ``open_run``.

    Of several processes that train one model, one ``writes``; for the others, what writes does nothing.
    """

    path: Path
    writes: bool = True

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
        if not self.writes:
            yield
            return
        lock = filelock.FileLock(self.path / ".lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UsageError(
                f"{self.path} is being written by another process: wait for it, or stop it first"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"{self.path} cannot be written to: {reason}; check its permissions") from None
        try:
            yield
        finally:
            lock.release()

    def read_config(self) -> tuple[RunConfig, ModelConfig]:
        """What the run was started with.

        Raises:
            UsageError: config.json is missing or was not written by elman; or its variant's code is not known here.
        """
        try:
            values = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            train = dict(values["train"])
            kind = TaskConfig if "task" in train else TrainConfig
            for name in ("data", "out", "start_from", "resume"):
                if train.get(name) is not None:
                    train[name] = Path(train[name])
            return kind(**train), ModelConfig.from_dict(values["model"])
        except own.UnknownCodeError as error:
            copy = self.path / OWN_VARIANTS.replace("*", error.name)
            raise UsageError(
                f"{self.path} is of the variant {error.name!r}, whose code has never been run here: read {copy}, and "
                f"let it be known by: elman check {shlex.quote(str(copy))}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{self.path}/config.json is not as elman train wrote it ({error}): "
                f"put the file back, or its variant's code if that has changed since, or start a new run"
            ) from None

    def read_text_config(self) -> tuple[TrainConfig, ModelConfig]:
        """As ``read_config``, of a run that learned a text.

        Raises:
            UsageError: it learned a task, or as ``read_config``.
        """
        config, model = self.read_config()
        if not isinstance(config, TrainConfig):
            raise UsageError(f"{self.path} learned a task, not a language: give a run folder of elman train")
        return config, model

    def write_config(self, train: RunConfig, model: ModelConfig) -> None:
        """Write config.json, and copies of variants that are in no elman."""
        for mixer in model.mixers:
            if mixer.code is not None and self.writes:
                (self.path / OWN_VARIANTS.replace("*", mixer.name)).write_bytes(own.text_of(mixer))
        self.write_json("config.json", {"train": asdict(train), "model": model.to_dict()})

    def write_json(self, name: str, value: Any) -> None:
        """Replace a file at once, so that a reader never sees half of it."""
        if not self.writes:
            return
        partial = self.path / f".{name}.partial"
        partial.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
        partial.replace(self.path / name)

    def read_json(self, name: str) -> Any:
        """A file's value, or None where it is not there.

        Raises:
            UsageError: it is no JSON.
        """
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{self.path / name} is damaged ({error}): remove it, and go on") from None

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl."""
        if not self.writes:
            return
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl; one that a kill cut short, or that is no metrics, is left out."""
        rows = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if isinstance(row, dict) and _is_metrics(row):
                        rows.append(row)
        return rows

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run does again."""
        if not self.writes:
            return
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        partial = self.path / ".metrics.jsonl.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(self.metrics_file)


def _is_metrics(row: dict[str, Any]) -> bool:
    numbers = [row.get("seconds"), row.get("loss", 0.0)]
    return type(row.get("step")) is int and 0 <= row["step"] < _MOST_STEPS and all(map(_is_number, numbers))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MOST


def check_free(path: Path) -> None:
    """A new run may be made here: nothing is there, or an empty folder.

    Raises:
        UsageError: something is.
    """
    if (path / "config.json").exists():
        raise UsageError(
            f"--out {path} holds another run and is left as it is: "
            f"give another folder, or go on with that run by --resume {path}"
        )
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {path} is a file: give the name of a folder to make")
    if path.exists() and any(inside.name != ".lock" for inside in path.iterdir()):
        raise UsageError(f"--out {path} is not empty and is left as it is: give the name of a new folder")


@contextlib.contextmanager
def create(path: Path | None, pattern: str) -> Iterator[RunFolder]:
    """Make a new run folder and lock it; without a path, one named after the model's pattern and the time.

    Raises:
        UsageError: something is there already, or the folder cannot be made.
    """
    try:
        if path is None:
            path = make_unique(Path("runs"), f"{re.sub(r'[,:]', '-', pattern)}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        else:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = path if path is not None else Path("runs")
        raise UsageError(f"--out {where} cannot be made: {error.strerror or error}; give another folder") from None
    run = RunFolder(path)
    with run.lock():
        check_free(path)
        yield run


def make_unique(folder: Path, stem: str) -> Path:
    """A new folder inside another, with a number behind its name where there is one of that name."""
    for n in itertools.count(1):
        path = folder / (stem if n == 1 else f"{stem}-{n}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError


def open_run(path: Path, option: str = "RUN") -> RunFolder:
    """An existing run folder.

    Raises:
        UsageError: there is none.
    """
    if not path.is_dir():
        raise UsageError(f"{option} {path}: no such folder; give the run folder that elman train printed")
    if (path / "elman_code.py").is_file():
        raise UsageError(f"{option} {path} is an export: give the run folder that it was made of")
    if not (path / "config.json").is_file():
        raise UsageError(f"{option} {path} is no run folder (it has no config.json): give one that elman train made")
    return RunFolder(path)


def newest_checkpoint(run: RunFolder) -> Path | None:
    """The run's latest checkpoint; None before its first save."""
    found = list_checkpoints(run.checkpoints)
    return found[-1] if found else None


def load_newest(
    run: RunFolder,
    tell: Callable[[str], None],
    *,
    with_trainer: bool = True,
    set_aside: bool = False,
    processes: Processes = ALONE,
    room: Room | None = None,
) -> tuple[Path, Checkpoint] | None:
    """The run's latest whole checkpoint and where it lies, to all ranks the same; None before its first save.

    Args:
        run: the run.
        tell: is called with a line for each damaged checkpoint that was passed over.
        with_trainer: as for ``load_checkpoint``.
        set_aside: rename the damaged ones, to save in their place; for who holds the run's lock.
        processes: as for ``load_checkpoint``.
        room: as for ``load_checkpoint``.

    Raises:
        UsageError: all are damaged, or one cannot be read.
    """
    damaged: list[tuple[Path, DamagedCheckpointError]] = []
    for path in reversed(processes.of_main(list_checkpoints(run.checkpoints))):
        try:
            checkpoint = load_checkpoint(path, with_trainer=with_trainer, processes=processes, room=room)
        except DamagedCheckpointError as error:
            damaged.append((path, error))
            continue
        for other, why in damaged:
            tell(f"{why}; going by {path.name}, which is whole")
            if set_aside:
                _set_aside(other)
        return path, checkpoint
    if damaged:
        complaint = f"{damaged[0][1]}; there is no whole one before it: put it back, or start a new run"
        raise processes.failure(UsageError(complaint))
    return None


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"damaged-{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)


def load_model(
    path: Path | str,
    tell: Callable[[str], None] = warnings.warn,
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """The model of a run folder, in evaluation mode; ``elman.load`` says what its options are.

    ``tell`` is called with a line for each damaged checkpoint that was passed over.

    Raises:
        UsageError: no run there, no whole checkpoint, none of that step, no such device, or no floating-point dtype.
    """
    return open_model(path, tell, step=step, device=device, dtype=dtype)[0]


def open_model(
    path: Path | str,
    tell: Callable[[str], None] = warnings.warn,
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[LanguageModel, Path]:
    """As ``load_model``, and the checkpoint that it was loaded from."""
    where = resolve_device(str(device))
    if dtype not in (None, *_DTYPES):
        raise UsageError(f"dtype={dtype} cannot hold weights: give a floating-point one, such as torch.bfloat16")
    run = open_run(Path(path))
    _, config = run.read_config()
    there = {step_of(found): found for found in list_checkpoints(run.checkpoints)}
    if not there:
        raise UsageError(f"{path} has no checkpoint yet: go on with it by elman train --resume {path}")
    if step is None:
        newest = load_newest(run, tell, with_trainer=False)
        assert newest is not None
        source, checkpoint = newest
    elif step in there:
        source, checkpoint = there[step], load_checkpoint(there[step], with_trainer=False)
    else:
        raise UsageError(f"checkpoint={step} is not in {path}: give one of {', '.join(map(str, there))}")
    _check_size(config, checkpoint.model, source)
    model = LanguageModel(config)
    load_weights(model, checkpoint.model, source)
    return model.to(where, dtype).eval(), source


def _check_size(config: ModelConfig, weights: dict[str, Tensor], source: Path) -> None:
    """That the weights can be those of the model, before it is built: one far larger might not fit into memory.

    Raises:
        UsageError: they are of another width, or too few.
    """
    width, found = (config.vocab_size, config.dim), weights.get(_EMBEDDING)
    if found is None or found.shape != width:
        raise _of_another_model(source, f"{_EMBEDDING} is {_shape(found)}", str(width))
    asked, there = num_params(config), sum(tensor.numel() for tensor in weights.values())
    if asked > there:
        raise _of_another_model(source, f"it holds {there:,} numbers", f"{asked:,}")


def _of_another_model(source: Path, has: str, asked: str) -> UsageError:
    return UsageError(
        f"checkpoint {source} belongs to another model: {has} but config.json asks for {asked}; "
        f"give the run folder it came with, or its variant's code as it was then"
    )


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def load_text(path: Path | str) -> tuple[Vocabulary, bool]:
    """How a run's model was shown text: its tokens, and whether a document's start reset its state.

    Raises:
        UsageError: no run there, its tokeniser is missing, or it never saw a text.
    """
    config, _ = open_run(Path(path)).read_text_config()
    return open_vocabulary(config.tokenizer), SAMPLERS[config.sampling].resets


def load_weights(
    model: LanguageModel,
    weights: dict[str, Tensor],
    source: Path,
    place: Callable[[Tensor, Tensor], Tensor] = lambda tensor, like: tensor,
) -> None:
    """Load weights that must fit the model to the letter.

    ``place`` makes of a whole tensor what the model has of it, which its second argument is like.

    Raises:
        UsageError: names or shapes differ: the checkpoint is another model's.
    """
    try:
        there = model.state_dict()
        model.load_state_dict(
            {name: place(tensor, there[name]) if name in there else tensor for name, tensor in weights.items()}
        )
    except RuntimeError:
        expected = {name: _shape(tensor) for name, tensor in model.state_dict().items()}
        found = {name: _shape(tensor) for name, tensor in weights.items()}
        name = min(key for key in expected | found if expected.get(key) != found.get(key))
        raise _of_another_model(
            source, f"{name} is {found.get(name, _shape(None))}", expected.get(name, "none")
        ) from None

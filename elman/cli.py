"""The command line: parses and calls."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from elman import __version__
from elman.errors import TrainingError, UsageError
from elman.mixers import MixerConfig, pattern_mixers
from elman.options import OptionalInt, OptionalPath, OptionalStr
from elman.studies.options import CompareRuns, ReportRuns, Studies
from elman.text import one_line
from elman.training.config import RunConfig, TaskConfig, TrainConfig

if TYPE_CHECKING:
    from elman.model import ModelConfig


@dataclass(frozen=True)
class Generate:
    """Write on from prompts with a trained model: a recurrent one in constant memory, however long the text."""

    run: tyro.conf.Positional[Path]
    """Run folder of elman train."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to go on from, its bytes as they are; given several times, several texts at a time. Empty starts a
    document."""
    prompt_file: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A file whose bytes are a prompt, of any size; likewise."""
    interactive: bool = False
    """Read a line, write on, and so on, the state kept between turns. Ctrl-C ends a turn, Ctrl-D all."""
    bytes: int = 500
    """How many to write, each text or turn."""
    temperature: float = 0.8
    """0 always takes the likeliest byte."""
    top_k: OptionalInt = None
    """Draw from so many of the likeliest bytes; from all if absent."""
    top_p: float = 0.95
    """Draw from the likeliest bytes that hold this much probability."""
    seed: int = 0
    """Of the draws."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto takes bf16 where a GPU has it."""
    graph: Literal["auto", "off"] = "auto"
    """auto captures a step in a CUDA graph on a GPU, but for layers of other packages."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""

    def run_command(self, console: Console) -> int:
        from elman.writing import Request, generate

        request = Request(
            run=self.run,
            prompts=self.prompt,
            prompt_files=self.prompt_file,
            interactive=self.interactive,
            num_bytes=self.bytes,
            sampling=(self.temperature, self.top_k, self.top_p, self.seed),
            precision=self.precision,
            graph=self.graph,
            device=self.device,
        )
        return generate(request, sys.stdout)


@dataclass(frozen=True)
class Evaluate:
    """Loss of a trained model on a text: in windows, with its state carried, and by length of context.

    Leaves numbers, tables and a picture in a new folder inside the run.
    """

    run: tyro.conf.Positional[Path]
    """Run folder of elman train."""
    data: OptionalPath = None
    """Raw text file, documents ended by 0x1e; the text that the run held out if absent."""
    mode: Literal["both", "carried", "windows"] = "both"
    """windows: each from a state at rest, as in training; carried: one state through all of the text."""
    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Lengths of context to compare on the same tokens, as far as the text is long enough; 0 for none."""
    context_rows: OptionalInt = None
    """Places in the text where contexts are compared; 128 on a GPU and 16 on a CPU if absent."""
    max_bytes: OptionalStr = None
    """How much of the text to read, such as 10m; all if absent."""
    batch_size: int = 64
    """Windows at a time."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto takes bf16 where a GPU has it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""

    def run_command(self, console: Console) -> int:
        from elman.evaluation.commands import Request, run_evaluation

        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        contexts = () if self.contexts == (0,) else self.contexts
        return run_evaluation(Request(**{**options, "contexts": contexts}), console)


@dataclass(frozen=True)
class Export:
    """Make a folder of a trained model for another library, which reads it without elman too."""

    run: tyro.conf.Positional[Path]
    """Run folder of elman train."""
    to: Literal["hf"] = "hf"
    """hf: Hugging Face's transformers, by AutoModelForCausalLM with trust_remote_code=True."""
    out: OptionalPath = None
    """Folder to make; RUN/hf if absent."""

    def run_command(self, console: Console) -> int:
        from elman.commands import export

        return export(self.run, self.out, console)


@dataclass(frozen=True)
class Models:
    """Table of the variants: equation, parameters, FLOPs a token, state."""

    params: str = "50m"
    """Size to compare them at."""
    depth: int = 6
    """Layers."""
    seq_len: int = 512
    """Context that FLOPs and state are counted for, where they depend on it."""

    def run_command(self, console: Console) -> int:
        from elman.commands import models

        return models(self.params, self.depth, self.seq_len, console)


@dataclass(frozen=True)
class Check:
    """Try what every variant keeps to: it carries its state, sees no future, heeds resets, counts itself, and more.

    For who writes one; it takes seconds, and no text.
    """

    model: tyro.conf.Positional[str]
    """Variant by name, or the file of one of your own, such as my_cell.py."""
    options: str = "{}"
    """Its options, as a JSON object, such as '{"expansion": 2}'."""

    def run_command(self, console: Console) -> int:
        from elman.commands import check

        return check(self.model, self.options, console)


@dataclass(frozen=True)
class Tasks:
    """Table of the synthetic tasks: what each asks, its chance level, its source; or one of them, with an example."""

    task: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TASK]", help_behavior_hint="")] = None
    """Task to tell of at length."""
    length: OptionalInt = None
    """Of the example, and that chance levels are told at; 12 and 40 if absent."""
    seed: int = 0
    """Of the example."""

    def run_command(self, console: Console) -> int:
        from elman.commands import show_task, tasks

        if self.task is None:
            return tasks(40 if self.length is None else self.length, console)
        return show_task(self.task, self.length, self.seed, console)


@dataclass(frozen=True)
class Doctor:
    """What this machine can run, and why not where it cannot."""

    def run_command(self, console: Console) -> int:
        from elman.commands import doctor

        return doctor(console)


@dataclass(frozen=True)
class Pack:
    """Pack files and folders, or a data set, into one raw file of documents, each ended by the byte 0x1e.

    Text and source files are one document each (packed files the documents they hold), .jsonl and .ndjson one a line;
    all of them may be gzipped (.gz).
    Binary and hidden files are left out. Files come in an order fixed by a hash of their paths, so that the tail of
    the file, which training holds out, is a fair sample. The rows of hf:NAME come in their own order.
    """

    paths: tyro.conf.Positional[list[Path]]
    """Files and folders; or hf:NAME or hf:NAME:CONFIG, a data set of the Hugging Face hub."""
    out: Path
    """File to make; it must not exist yet."""
    field: Annotated[str, tyro.conf.arg(aliases=["--column"])] = "text"
    """Field of a JSON line, or column of a data set, that holds the text."""
    split: str = "train"
    """Part of a data set."""
    skip_bad: bool = False
    """Leave out lines and rows without text and count them, instead of stopping."""

    def run_command(self, console: Console) -> int:
        from elman.commands import pack

        return pack(self.paths, self.out, self.field, self.split, self.skip_bad, console)


@dataclass(frozen=True)
class Info:
    """Size, documents, their lengths and the byte histogram of a raw file."""

    file: tyro.conf.Positional[Path]
    """Raw text file."""

    def run_command(self, console: Console) -> int:
        from elman.commands import info

        return info(self.file, console)


@dataclass(frozen=True)
class Data:
    """Make a raw file of text, or look into one."""

    command: Annotated[
        Annotated[Pack, tyro.conf.subcommand("pack")] | Annotated[Info, tyro.conf.subcommand("info")],
        tyro.conf.arg(name=""),
    ]

    def run_command(self, console: Console) -> int:
        return self.command.run_command(console)


#: File names and samples are shown as they are, not read as rich's markup.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}


def _read_config(path: Path, option: str) -> tuple[RunConfig, ModelConfig]:
    """Of the run folder that an option names."""
    from elman.training.run import open_run

    return open_run(path, option).read_config()


def _run_command(kind: type[RunConfig], argv: list[str]) -> Any:
    """The type of ``train`` or ``task``: a run's options of this kind, and those of the mixers that ``argv`` names.

    Which options a mixer has is known only once it is chosen, so what tells that is read ahead: ``--model``,
    ``--resume`` and ``--start-from``.
    """

    @dataclass
    class Choice:
        model: Annotated[str | None, tyro.conf.arg(aliases=["--level"])] = None
        resume: Path | None = None
        start_from: Path | None = None

    try:
        choice, _ = tyro.cli(Choice, args=argv, return_unknown_args=True, add_help=False, console_outputs=False)
    except SystemExit:
        choice = Choice()  # the whole command line is parsed again below, and the mistake shown there
    base: RunConfig | None = None
    if choice.resume is not None:
        saved, model = _read_config(choice.resume, "--resume")
        # Either command goes on with a run of either kind.
        base, kind = dataclasses.replace(saved, resume=choice.resume), type(saved)
        mixers: list[MixerConfig] = list(model.mixers)
    elif choice.start_from is not None and choice.model is None:
        mixers = list(_read_config(choice.start_from, "--start-from")[1].mixers)
    else:
        mixers = list(pattern_mixers(choice.model if choice.model is not None else "e1"))
    names = tuple(mixer.name for mixer in mixers)
    distinct = {mixer.name: mixer for mixer in mixers}
    #: What a dataclass may call a variant of any name.
    attributes = {name: re.sub(r"\W", "_", name) for name in distinct}

    def run_command(self: Any, console: Console) -> int:
        from elman.training.display import RunConsole
        from elman.training.start import resume_run, start_run

        chosen = tuple(getattr(self, attributes[name]) for name in names)
        return (start_run if self.config.resume is None else resume_run)(self.config, chosen, RunConsole(**_PLAIN))

    def prefix(name: str) -> Any:
        return tyro.conf.arg(name="" if len(distinct) == 1 else name)

    config_field = dataclasses.field(default=base) if base is not None else dataclasses.field()
    command = dataclasses.make_dataclass(
        kind.__name__.removesuffix("Config"),
        [
            ("config", Annotated[kind, tyro.conf.arg(name="")], config_field),
            *(
                (attributes[name], Annotated[type(mixer), prefix(name)], dataclasses.field(default=mixer))
                for name, mixer in distinct.items()
            ),
        ],
        namespace={"run_command": run_command},
        frozen=True,
    )
    what = "Train a small model on a synthetic task" if kind is TaskConfig else "Train a language model"
    command.__doc__ = f"{what} ({','.join(names)}): --model NAME --help shows that variant's options."
    return command


def parse(argv: list[str], tells: bool = True) -> Any:
    """The command that ``argv`` asks for, its options checked; its ``run_command`` does it.

    Raises:
        UsageError: an option whose value is wrong.
        SystemExit: with 0 after ``--help``, with 2 where ``argv`` does not parse, which is said if ``tells``.
    """
    train: Any = _run_command(TrainConfig, argv[1:] if argv[:1] == ["train"] else [])
    task: Any = _run_command(TaskConfig, argv[1:] if argv[:1] == ["task"] else [])
    commands = (
        Annotated[train, tyro.conf.subcommand("train")]
        | Annotated[task, tyro.conf.subcommand("task")]
        | Annotated[Tasks, tyro.conf.subcommand("tasks")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Evaluate, tyro.conf.subcommand("eval")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Models, tyro.conf.subcommand("models")]
        | Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[Doctor, tyro.conf.subcommand("doctor")]
        | Annotated[Data, tyro.conf.subcommand("data")]
        | Annotated[Studies, tyro.conf.subcommand("study")]
        | Annotated[ReportRuns, tyro.conf.subcommand("report")]
        | Annotated[CompareRuns, tyro.conf.subcommand("compare")]
    )
    config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    command: Any = tyro.cli(
        commands,
        args=argv,
        prog="elman",
        description="How far can simple nonlinear RNNs go with modern engineering?",
        config=config,
        console_outputs=tells,
    )
    return command


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 1 (training failed), 2 (wrong use), 130 (stopped)."""
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _exit_on_signal)
    signal.signal(signal.SIGHUP, _exit_on_signal)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character shows its code.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(**_PLAIN)
    # Processes that torchrun started have one command line: the first of a machine tells what is wrong with it.
    tells = os.environ.get("LOCAL_RANK", "0") == "0"
    if argv == ["--version"]:
        console.print(f"elman {__version__}")
        return 0
    try:
        command = parse(argv, tells)
        tells = True
        code: int = command.run_command(console)
        return code
    except SystemExit:
        if not tells:
            _wait_for_who_tells()
        raise
    except UsageError as error:
        return _fail(str(error), 2, tells)
    except TrainingError as error:
        return _fail(str(error), 1, tells)
    except KeyboardInterrupt:
        print("elman: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has gone (| head): that is no error, but Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; check the path, its permissions and the free space", 2, tells)


def _fail(message: str, code: int, tells: bool) -> int:
    if tells:
        print(f"elman: {one_line(message)}", file=sys.stderr)
    else:
        _wait_for_who_tells()
    return code


def _wait_for_who_tells() -> None:
    """As soon as one process ends, torchrun ends the others, one of which may not have told why yet."""
    time.sleep(5)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """End as the signal would have ended us, but by an exception, so that half-made files are removed."""
    sys.exit(128 + number)

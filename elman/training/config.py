"""The options of a run, as on the command line: what all have in common, and what a text or a task has beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import InitVar, dataclass, field, replace
from typing import Annotated, ClassVar, Literal, Self

import tyro

from elman.data.vocabulary import open_vocabulary
from elman.errors import UsageError
from elman.evaluation.tasks import find_task
from elman.mixers.base import WeightInit
from elman.options import OptionalInt, OptionalPath, OptionalStr, check_at_least, check_types
from elman.units import parse_count, parse_duration

#: Rates below this are taken.
MAX_LR = 100


@dataclass(frozen=True)
class RunConfig(ABC):
    """Everything that a run is, whatever it learns from, but for the options of its mixers."""

    model: Annotated[str, tyro.conf.arg(aliases=["--level"])] = "e1"
    """Variant by name or number (1 means e1), the file of one of your own, such as my_cell.py, or a pattern of them
    repeated over the depth, such as e0,e1; elman is the one that learns most."""
    params: OptionalStr = None
    """Parameters to size the model for, such as 50m; within 2%. The default is 10m where no --dim is given."""
    dim: OptionalInt = None
    """Width of the residual stream; solved for from --params if absent."""
    depth: OptionalInt = None
    """Layers; 6 if absent, or solved for where --params and --dim are given."""

    seq_len: int = 512
    """Bytes, or tokens, a training window."""
    batch_size: int = 32
    """Windows, or streams, a step, those of all processes."""
    grad_accum: int = 1
    """Parts that a step's batch, or each process's share of it, is split into, to save memory; the step stays the
    same."""

    steps: OptionalInt = None
    """Stop after this many steps."""
    time_limit: OptionalStr = None
    """Stop after this much training time, such as 10m; evaluation and saving do not count."""
    optimizer: Literal["adamw", "schedulefree", "muon"] = "adamw"
    """AdamW; AdamW that averages its weights in place of a schedule (package schedulefree); or Muon for matrices and
    AdamW for the rest."""
    lr: float = 1e-3
    """Learning rate, which means the same to AdamW and Muon: what the warm-up rises to and the cosine falls from, both
    from the first step on."""
    warmup: Annotated[int | float, tyro.conf.arg(metavar="INT|FLOAT")] = 100
    """Steps of linear warm-up; or, below 1, the part of the run that it takes, as long for a slow model as for a fast
    one. The cosine falls meanwhile: with 0.3 the rate is never above 0.79 of --lr, with 0.1 0.98."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up: falls to zero at the end, or stays, as it always does for
    schedulefree."""
    weight_decay: float = 0.1
    """Of weights; biases, norms and decays are not decayed."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    weight_init: WeightInit = "normal"
    """How matrices start, but for W_h: normal, N(0, 0.02²); fan_in, N(0, 1 / inputs), but such as write to the residual
    stream as before; zero_out, these 0, with which small models learn more."""
    max_skipped: int = 10
    """A step whose loss or gradient is not finite is skipped; the run stops at this many in a row."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a CUDA GPU where there is one."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How the processes that torchrun starts share a step's batch: each with the whole model (ddp), or each with a part
    of its weights and moments (fsdp). auto is ddp where torchrun started several processes, else none."""
    ddp: InitVar[bool] = False
    """Short for --parallel ddp."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = "auto"
    """Of the products; weights stay float32. auto is bf16 on a GPU, fp32 on a CPU. With fp16 the loss is scaled so that
    gradients neither vanish nor overflow. fp8: bf16, but the large products in 8 bits, by torchao."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Fuse what stands between the products by torch.compile before training starts, which is not charged to
    --time-limit. auto does on a GPU, where a C compiler is there."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Capture a whole step in a CUDA graph and replay it, so that the host keeps up however many kernels a step has.
    auto does where it can: for AdamW on one GPU, but not in fp16."""
    eval_every: int = 500
    """Steps between evaluations; 0 evaluates only at the end."""
    save_every: int = 1000
    """Steps between checkpoints; 0 saves only at the end."""
    profile: bool = False
    """Show where a step's time goes, and leave a trace of three steps in the run folder. They are slower."""
    stats_every: int = 100
    """Steps between looks at the layers: activations, saturation, gradients and recurrent matrices; 0 never looks."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Show the metrics in TensorBoard too, from the run's folder tensorboard; auto does where the package is there."""
    wandb: OptionalStr = None
    """Show the metrics in this project of Weights & Biases too (package wandb)."""
    out: OptionalPath = None
    """Run folder to make; runs/MODEL-DATE-TIME if absent. An existing run is never overwritten."""
    start_from: OptionalPath = None
    """Run folder whose newest weights this run starts from, in place of random ones. Its model is that run's; the
    optimiser, the schedule and the data begin anew."""
    resume: OptionalPath = None
    """Run folder to go on with, from its newest checkpoint and with its own options. A --steps or --time-limit given
    beside it replaces the run's end."""

    #: Parameters of a model of which neither --params nor --dim is given, and its layers if --depth is not.
    default_params: ClassVar[str]
    default_depth: ClassVar[int | None] = None

    def __post_init__(self, ddp: bool) -> None:
        check_types(self)
        if self.optimizer == "schedulefree":
            object.__setattr__(self, "schedule", "constant")
        if ddp:
            if self.parallel not in ("auto", "ddp"):
                raise UsageError(f"--ddp is short for --parallel ddp, not {self.parallel}: give one of them")
            object.__setattr__(self, "parallel", "ddp")
        check_at_least(self, seq_len=1, batch_size=1, grad_accum=1, steps=1, dim=1, depth=1, max_skipped=1)
        check_at_least(self, warmup=0, eval_every=0, save_every=0, stats_every=0, weight_decay=0, grad_clip=0, seed=0)
        if self.warmup > 1 and self.warmup % 1:
            raise UsageError(f"--warmup {self.warmup} is neither: give whole steps, or a part of the run below 1")
        if not 0 < self.lr < MAX_LR:
            raise UsageError(f"--lr {self.lr} is out of range: give a number above 0, such as 1e-3")
        if self.batch_size % self.grad_accum:
            raise UsageError(
                f"--grad-accum {self.grad_accum} does not divide --batch-size {self.batch_size}: give a divisor of it"
            )
        if self.steps is None and self.time_limit is None:
            raise UsageError("a run needs an end: give --steps N, --time-limit 10m, or both")
        for name in ("params", "dim", "depth") if self.start_from is not None else ():
            if (size := getattr(self, name)) is not None:
                raise UsageError(
                    f"--{name} {size} is of no use beside --start-from {self.start_from}: "
                    f"a model that starts from another is as large; drop --{name}"
                )
        # Parsed here for its errors alone, before anything is made.
        _ = self.time_limit_s, self.param_count

    @property
    def time_limit_s(self) -> float | None:
        """``--time-limit`` in seconds."""
        return None if self.time_limit is None else parse_duration(self.time_limit, "--time-limit")

    @property
    def param_count(self) -> int | None:
        """``--params`` as a number."""
        if self.params is None:
            return parse_count(self.default_params, "--params") if self.dim is None else None
        return parse_count(self.params, "--params")

    @property
    def layers(self) -> int | None:
        """``--depth``, or what it is if absent; None where that is for ``size_model`` to tell."""
        if self.depth is None and (self.params is None or self.dim is None):
            return self.default_depth
        return self.depth

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens of the model."""

    def resolved(self) -> Self:
        """As config.json keeps it: so that it means the same wherever it is read."""
        return self if self.start_from is None else replace(self, start_from=self.start_from.absolute())


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A run that learns a language from a text."""

    data: OptionalPath = None
    """Raw text file, documents ended by 0x1e; Python's standard library if absent."""
    heldout: float = 0.05
    """Part of the file, at its end, kept for evaluation (at most 10 MB)."""
    sampling: Literal["windows", "documents", "tbptt"] = "windows"
    """What a step reads: windows from anywhere, which take 0x1e for a byte like any other; documents one behind the
    other, each from a state at rest; or tbptt, streams that go on from step to step, as does the state until the next
    document."""
    tbptt: InitVar[bool] = False
    """Short for --sampling tbptt."""
    tokenizer: OptionalStr = None
    """Tokens of this tiktoken encoding, such as p50k_base, made from the file while training; bytes if absent."""
    workers: int = 2
    """Processes that make tokens ahead, with --tokenizer; 0 makes them between steps."""
    eval_bytes: str = "1m"
    """Held-out bytes an evaluation reads, evenly spread."""

    default_params: ClassVar[str] = "10m"

    def __post_init__(self, ddp: bool, tbptt: bool) -> None:
        super().__post_init__(ddp)
        if tbptt:
            if self.sampling == "documents":
                raise UsageError("--tbptt is short for --sampling tbptt, not documents: give one of them")
            object.__setattr__(self, "sampling", "tbptt")
        check_at_least(self, workers=0)
        _ = self.eval_byte_count

    @property
    def eval_byte_count(self) -> int:
        """``--eval-bytes`` as a number."""
        return parse_count(self.eval_bytes, "--eval-bytes")

    @property
    def vocab_size(self) -> int:
        return open_vocabulary(self.tokenizer).size

    def resolved(self) -> Self:
        assert self.data is not None
        return replace(super().resolved(), data=self.data.absolute())


@dataclass(frozen=True)
class TaskConfig(RunConfig):
    """A run that learns a synthetic task, on examples that are drawn while it trains."""

    # Options whose defaults fit a small model and a short run.
    params: OptionalStr = None
    """Parameters to size the model for, such as 1m; within 2%. The default is 200k where no --dim is given."""
    depth: OptionalInt = None
    """Layers; 2 if absent, or solved for where --params and --dim are given."""
    seq_len: Annotated[int, tyro.conf.arg(name="train-length", aliases=["--seq-len"])] = 40
    """Tokens of a training example. Where a task's examples are not their own prefixes too, each step draws a length
    up to this one."""
    batch_size: int = 64
    """Examples a step, those of all processes."""
    steps: OptionalInt = None
    """Stop after this many steps; 2000 if absent, and no --time-limit is given."""
    lr: float = 3e-3
    """Learning rate, which means the same to AdamW and Muon: what the warm-up rises to and the cosine falls from, both
    from the first step on."""
    weight_decay: float = 0.01
    """Of weights; biases, norms and decays are not decayed."""
    compile: Literal["auto", "on", "off"] = "off"
    """Fuse what stands between the products by torch.compile before training starts, which is not charged to
    --time-limit, and takes longer than most tasks do."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    stats_every: int = 0
    """Steps between looks at the layers: activations, saturation, gradients and recurrent matrices; 0 never looks."""
    tensorboard: Literal["auto", "on", "off"] = "off"
    """Show the metrics in TensorBoard too, from the run's folder tensorboard; auto does where the package is there."""

    task: tyro.conf.Positional[str] = field(kw_only=True)
    """Name of a task; elman tasks lists them."""
    eval_multiples: tuple[int, ...] = (1, 2, 4, 10)
    """Lengths that accuracy is told at in the end, as multiples of --train-length."""
    eval_examples: int = 256
    """Examples of each length an evaluation reads, always the same ones."""
    workers: int = 1
    """Processes that make examples ahead, on a GPU; 0 makes them between steps, as a CPU always does."""

    default_params: ClassVar[str] = "200k"
    default_depth: ClassVar[int | None] = 2

    def __post_init__(self, ddp: bool) -> None:
        if self.steps is None and self.time_limit is None:
            object.__setattr__(self, "steps", 2000)
        # As JSON has no tuples.
        object.__setattr__(self, "eval_multiples", tuple(self.eval_multiples))
        super().__post_init__(ddp)
        check_at_least(self, workers=0, eval_examples=1)
        if not self.eval_multiples:
            raise UsageError("--eval-multiples is empty: give whole numbers of at least 1, such as 1 2 4 10")
        if min(self.eval_multiples) < 1:
            given = " ".join(map(str, self.eval_multiples))
            raise UsageError(f"--eval-multiples {given} is out of range: give whole numbers of at least 1")
        task = find_task(self.task)
        task.check_length(self.seq_len, "--train-length")
        for multiple in self.eval_multiples:
            task.check_length(
                multiple * self.seq_len, f"--eval-multiples {multiple} of --train-length {self.seq_len}: a length of"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of training, and then those that accuracy is told at beside it, in their order."""
        return (self.seq_len, *sorted({n * self.seq_len for n in self.eval_multiples} - {self.seq_len}))

    @property
    def vocab_size(self) -> int:
        return find_task(self.task).vocab_size

"""A text as a run reads it: a raw file, its tokens, and the part of it that is held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import RenderableType
from rich.panel import Panel
from rich.text import Text

from elman.data.bytes import open_bytes
from elman.data.sampling import SAMPLERS
from elman.data.streams import TokenStreams
from elman.data.vocabulary import open_vocabulary
from elman.errors import UsageError
from elman.evaluation.heldout import HeldoutLoss, HeldoutText, evaluate
from elman.generation import generate
from elman.text import readable
from elman.training.config import TrainConfig
from elman.training.run import RunFolder
from elman.training.source import Outcome, Source

if TYPE_CHECKING:
    from elman.training.loop import Trainer

_SAMPLE_BYTES = 300


@dataclass(frozen=True)
class TextOutcome(Outcome):
    """The loss on the held-out part; its unit is that of the text's tokens."""

    heldout: HeldoutLoss
    unit: str

    @property
    def loss(self) -> float:
        return self.heldout.nats_per_token

    def row(self) -> dict[str, float]:
        return {"heldout_loss": self.loss, "heldout_bits_per_byte": self.heldout.bits_per_byte}

    def line(self) -> str:
        return f"held-out loss {self.loss:.4f} nats/{self.unit}  {self.heldout.bits_per_byte:.4f} bits/byte"

    def summary(self) -> dict[str, Any]:
        return {
            "heldout": {
                **asdict(self.heldout),
                "nats_per_byte": self.heldout.nats_per_byte,
                "bits_per_byte": self.heldout.bits_per_byte,
            }
        }

    def facts(self) -> list[tuple[str, str]]:
        return [
            ("held-out loss", f"{self.loss:.4f} nats/{self.unit}"),
            ("", f"{self.heldout.bits_per_byte:.4f} bits/byte"),
            ("held-out bytes read", f"{self.heldout.bytes:,}"),
        ]


class TextSource(Source):
    """The file that ``--data`` names, in tokens of ``--tokenizer``, read as ``--sampling`` says."""

    judge = "held-out loss"

    def __init__(self, config: TrainConfig) -> None:
        assert config.data is not None
        self.config = config
        self.data = open_bytes(config.data, config.heldout)
        self.fingerprint = self.data.fingerprint()
        self.vocabulary = open_vocabulary(config.tokenizer)
        self.unit = self.vocabulary.unit
        streams_of_tokens = config.sampling == "tbptt" and config.tokenizer is not None
        self.sampler = (TokenStreams if streams_of_tokens else SAMPLERS[config.sampling])(
            self.data.train, config.seq_len, config.batch_size, config.seed, self.vocabulary
        )
        self.heldout = HeldoutText.cut(
            self.data.heldout, config.seq_len, config.eval_byte_count, self.vocabulary, self.sampler.resets
        )

    def describe(self) -> str:
        return f"{self.config.data}: {len(self.data.train):,} bytes to train on, {len(self.data.heldout):,} held out"

    def check_vocabulary(self, size: int) -> None:
        if self.vocabulary.size != size:
            raise UsageError(
                f"--tokenizer {self.config.tokenizer} has {self.vocabulary.size} tokens, but the model was made for "
                f"{size}: install the tiktoken that the run began with, or start a new run"
            )

    def check_fingerprint(self, begun_with: str) -> None:
        if begun_with != self.fingerprint:
            raise UsageError(
                f"--data {self.config.data} is not the file that the run began with: "
                f"name that file by --data, or start a new run"
            )

    def workers(self, device: torch.device) -> int:
        return self.config.workers if self.config.tokenizer is not None else 0

    def evaluate(self, trainer: Trainer, stop: Callable[[], bool], *, final: bool) -> TextOutcome | None:
        heldout = evaluate(
            trainer.model,
            self.heldout,
            batch_size=trainer.rows,
            device=trainer.device,
            autocast=trainer.autocast,
            stop=stop,
            rank=trainer.processes.rank,
            world_size=trainer.processes.size,
            total=trainer.processes.sum,
        )
        return None if heldout is None else TextOutcome(heldout, self.unit)

    def leave(self, trainer: Trainer, outcome: Outcome) -> list[RenderableType]:
        sample = self._sample(trainer)
        if trainer.processes.is_main:
            (trainer.run.path / "sample.txt").write_text(sample, encoding="utf-8")
        return [Panel(Text(sample), title="sample", title_align="left")]

    def _sample(self, trainer: Trainer) -> str:
        """What the model writes from nothing, in characters that a terminal can show."""
        with trainer.optimizer.averaged():
            drawn = bytes(
                generate(
                    trainer.model.eval(),
                    b"",
                    _SAMPLE_BYTES,
                    seed=self.config.seed,
                    vocabulary=self.vocabulary,
                    resets=self.sampler.resets,
                )
            )
        return readable(drawn.decode("utf-8", "replace"))

    def farewell(self, run: RunFolder) -> list[str]:
        return [
            f"results in {run.path}: summary.json, metrics.jsonl, loss.png, sample.txt, checkpoints/",
            f"write with it: elman generate {run.path} --prompt 'def '",
        ]

"""Loss on text that training never reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from elman.data.bytes import Bytes, gather, heldout_starts
from elman.data.sampling import document_starts
from elman.data.vocabulary import BYTES, Tokens, Vocabulary
from elman.model import next_token_loss
from elman.units import bits


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean loss over the held-out windows, each from a state at rest, as in training."""

    nats_per_token: float
    tokens: int
    bytes: int

    @property
    def nats_per_byte(self) -> float:
        """Of the bytes that the tokens stand for."""
        return self.nats_per_token * self.tokens / self.bytes

    @property
    def bits_per_byte(self) -> float:
        """The same in bits: what models of any vocabulary can be compared by."""
        return bits(self.nats_per_byte)


@dataclass(frozen=True)
class HeldoutText:
    """Windows of the held-out part: the same ones at every evaluation.

    Attributes:
        tokens: all of the part's.
        starts: where windows of ``seq_len + 1`` tokens start.
        resets: whether a document's start resets the state, as in training.
    """

    tokens: Tokens
    starts: npt.NDArray[np.int64]
    seq_len: int
    vocabulary: Vocabulary
    resets: bool

    @classmethod
    def cut(
        cls, text: Bytes, seq_len: int, max_bytes: int, vocabulary: Vocabulary = BYTES, resets: bool = False
    ) -> HeldoutText:
        """The whole text if ``max_bytes`` allows, else windows spread evenly over it.

        Raises:
            UsageError: not one window fits.
        """
        tokens = vocabulary.encode(text)
        max_tokens = max_bytes * len(tokens) // max(1, len(text))
        starts = heldout_starts(tokens, seq_len, max_tokens, vocabulary.unit)
        return cls(tokens, starts, seq_len, vocabulary, resets)


def evaluate(
    model: nn.Module,
    text: HeldoutText,
    *,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
    stop: Callable[[], bool] = lambda: False,
    rank: int = 0,
    world_size: int = 1,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> HeldoutLoss | None:
    """Mean loss over the windows of ``text``.

    ``stop`` is asked between batches; once it is true, the evaluation ends with None. Of several ranks each takes every
    ``world_size``-th batch, and ``total`` adds up a tensor over the ranks: all of them end with the same number, that
    of one rank which reads the same batches.
    """
    batches = range(0, len(text.starts), batch_size)
    # By batch: its loss and its bytes. To add zeros changes no bit.
    sums = torch.zeros(2, len(batches), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for first in range(0, len(batches), world_size):
                if stop():
                    return None
                # Who has none left goes along with the last, which does not count: shards are gathered by all ranks.
                batch = min(first + rank, len(batches) - 1)
                rows = gather(text.tokens, text.starts[batches[batch] :][:batch_size], text.seq_len)
                reset = None
                if text.resets:
                    starts = document_starts(rows, True, text.vocabulary.delimiter)
                    reset = torch.from_numpy(starts).to(device)
                windows = torch.from_numpy(rows).to(device)
                with autocast():
                    logits, _ = model(windows[:, :-1], None, reset)
                if first + rank == batch:
                    sums[0, batch] = next_token_loss(logits, windows[:, 1:], reduction="sum")
                    sums[1, batch].fill_(int(text.vocabulary.lengths[rows[:, 1:]].sum()))
    finally:
        model.train(was_training)
    nats, num_bytes = total(sums).sum(1).tolist()
    count = len(text.starts) * text.seq_len
    return HeldoutLoss(nats / count, count, int(num_bytes))

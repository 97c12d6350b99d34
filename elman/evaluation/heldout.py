"""Loss on text that training never reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from elman.data.bytes import Bytes, gather, heldout_starts
from elman.model import next_token_loss
from elman.units import bits


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean loss over the held-out windows, each from a state at rest, as in training."""

    nats_per_byte: float
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The same in bits."""
        return bits(self.nats_per_byte)


def evaluate(
    model: nn.Module,
    data: Bytes,
    *,
    seq_len: int,
    batch_size: int,
    max_bytes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
    stop: Callable[[], bool] = lambda: False,
) -> HeldoutLoss | None:
    """Mean loss over windows of ``data``: the same ones at every call, the whole of it if ``max_bytes`` allows.

    ``stop`` is asked between batches; once it is true, the evaluation ends with None.
    """
    starts = heldout_starts(data, seq_len, max_bytes)
    total = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for first in range(0, len(starts), batch_size):
                if stop():
                    return None
                windows = torch.from_numpy(gather(data, starts[first : first + batch_size], seq_len)).to(device)
                with autocast():
                    logits, _ = model(windows[:, :-1])
                total += next_token_loss(logits, windows[:, 1:], reduction="sum")
    finally:
        model.train(was_training)
    count = len(starts) * seq_len
    return HeldoutLoss(total.item() / count, count)

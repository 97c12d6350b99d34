"""How much of a task a model gets right, at lengths that it was trained at and at longer ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elman.evaluation.tasks import Examples, Task
from elman.model import IGNORED, next_token_loss

#: Of a Philox generator: training's keys are a seed and 0, so that no run trains on what it is judged by.
_KEY = (0, 1)


@dataclass(frozen=True)
class Accuracy:
    """What a model got right in examples of one length.

    Attributes:
        length: tokens an example.
        examples: how many.
        accuracy: part of the positions that count whose target had the largest logit.
        beyond: the same over positions past the training length; None where none counts.
        whole: part of the examples of which every position was right.
        chance: what the best constant guess would have for ``accuracy``.
        nats: mean loss of the positions that count.
    """

    length: int
    examples: int
    accuracy: float
    beyond: float | None
    whole: float
    chance: float
    nats: float


def draw_examples(task: Task, count: int, length: int) -> Examples:
    """The examples that every model is judged by: a function of the task, their number and length alone."""
    generator = np.random.Generator(np.random.Philox(key=_KEY, counter=[0, 0, 0, length]))
    return task.examples(generator, count, length)


def measure(
    model: nn.Module,
    task: Task,
    length: int,
    *,
    count: int,
    train_length: int,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
    stop: Callable[[], bool] = lambda: False,
) -> Accuracy | None:
    """Accuracy in ``count`` examples of a length, each from a state at rest.

    They are read ``train_length`` tokens at a time, the state being carried on, as a model meets an endless sequence.
    ``stop`` is asked between batches; once it is true, the measurement ends with None.
    """
    examples = draw_examples(task, count, length)
    tokens, targets, mask = (torch.from_numpy(part) for part in examples)
    right = torch.zeros_like(mask)
    nats = torch.zeros((), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for first in range(0, count, batch_size):
                if stop():
                    return None
                rows = slice(first, min(first + batch_size, count))
                state: Any = None
                for at in range(0, length, train_length):
                    place = rows, slice(at, at + train_length)
                    # The last rows fill a batch with the first ones: no kernel of another shape for them.
                    chunk = _filled(tokens[place], batch_size).to(device)
                    with autocast():
                        logits, state = model(chunk, state)
                    logits = logits[: rows.stop - rows.start].float()
                    expected = targets[place].to(device)
                    right[place] = (logits.argmax(-1) == expected).cpu()
                    counts = mask[place].to(device)
                    if counts.any():
                        nats += next_token_loss(logits, expected.where(counts, IGNORED), reduction="sum").double().cpu()
    finally:
        model.train(was_training)
    right &= mask
    late = mask[:, train_length:]
    return Accuracy(
        length=length,
        examples=count,
        accuracy=int(right.sum()) / int(mask.sum()),
        beyond=int(right[:, train_length:].sum()) / int(late.sum()) if late.any() else None,
        whole=int((right == mask).all(1).sum()) / count,
        chance=task.chance(length),
        nats=float(nats) / int(mask.sum()),
    )


def _filled(rows: Tensor, count: int) -> Tensor:
    """``rows``, repeated to ``count`` of them."""
    return rows[torch.arange(count) % len(rows)]

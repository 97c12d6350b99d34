"""Loss over long text: with the state carried through all of it, by position in the document, by length of context."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elman.data.vocabulary import Tokens, Vocabulary
from elman.evaluation.heldout import HeldoutLoss
from elman.mixers import State
from elman.model import LanguageModel, next_token_losses
from elman.sizing import state_size

#: Tokens, and logits, that are run at a time, in all rows.
_CHUNK = 1 << 16
_LOGITS = 1 << 27
#: Tokens that each stream but the first reads ahead of its part, so that its state is not at rest there.
WARM_UP = 4096
#: The fewest tokens of a stream's part, so that little is read twice.
_LEAST_PART = 16 * WARM_UP
_MOST_STREAMS = 64
#: Of every context: the tokens whose loss is taken, and how much of rows and contexts is run at a time.
TARGETS = 256
_CONTEXT_TOKENS = 1 << 20

#: Is told of tokens that were read.
Tell = Callable[[int], None]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bin:
    """Mean loss of the tokens that have ``first`` to ``last`` others of their document before them."""

    first: int
    last: int
    tokens: int
    nats_per_token: float
    nats_per_byte: float


@dataclass(frozen=True)
class ContextLoss:
    """Mean loss of the same tokens, whatever the context: the last ``TARGETS`` of each row.

    Attributes:
        context: tokens read from rest before the first of them.
        standard_error: of the mean nats per byte, rows taken for independent; None of one row.
    """

    context: int
    tokens: int
    nats_per_token: float
    nats_per_byte: float
    standard_error: float | None


@dataclass(frozen=True)
class Reader:
    """A model and how it was shown text.

    Attributes:
        model: in evaluation mode.
        vocabulary: of its tokens.
        resets: whether a document's start resets the state, as it did in training.
        dtype: of autocast; None computes in the model's own.
    """

    model: LanguageModel
    vocabulary: Vocabulary
    resets: bool
    dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    @property
    def carries(self) -> bool:
        """Whether its state is of constant size, and can so be carried through text of any length."""
        return state_size(self.model.config, 1) == state_size(self.model.config, 2)

    def steps(self, rows: int) -> int:
        """How many tokens of so many rows to run at a time."""
        return max(1, min(_CHUNK, _LOGITS // self.vocabulary.size) // rows)

    def autocast(self) -> AbstractContextManager[None]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def read(self, tokens: Tokens, state: State, reset: npt.NDArray[np.bool_]) -> tuple[Tensor, State]:
        """Losses in nats (B, T) of the tokens (B, T + 1) but the first; reset (B, T); and the state."""
        there = torch.from_numpy(tokens.astype(np.int64)).to(self.device, non_blocking=True)
        anew = torch.from_numpy(reset).to(self.device, non_blocking=True) if reset.any() else None
        with self.autocast():
            logits, state = self.model(there[:, :-1], state, anew)
        return next_token_losses(logits, there[:, 1:]), state


@dataclass
class _Sums:
    """Losses on the device and, on the host, how many, by bin. What falls into none is not counted."""

    device: torch.device
    bins: int
    nats: Tensor = field(init=False)
    tokens: Ints = field(init=False)
    bytes: Ints = field(init=False)

    def __post_init__(self) -> None:
        self.nats = torch.zeros(self.bins + 1, dtype=torch.float64, device=self.device)
        self.tokens, self.bytes = np.zeros((2, self.bins), dtype=np.int64)

    def add(self, losses: Tensor, bins: Ints, lengths: Ints) -> None:
        """All (B, T); a bin of -1 does not count."""
        places = torch.from_numpy(np.where(bins < 0, self.bins, bins)).to(self.device, non_blocking=True)
        self.nats.index_add_(0, places.flatten(), losses.flatten().double())
        counted = bins >= 0
        self.tokens += np.bincount(bins[counted], minlength=self.bins)
        self.bytes += np.bincount(bins[counted], weights=lengths[counted], minlength=self.bins).astype(np.int64)


@torch.inference_mode()
def carried_loss(
    reader: Reader, tokens: Tokens, tell: Tell, streams: int | None = None
) -> tuple[HeldoutLoss, list[Bin]]:
    """Mean loss of all tokens but the first, the state carried from each to the next; and by place in the document.

    The text is read as several streams at a time, parts of equal length, each of which starts ``WARM_UP`` tokens ahead
    of its part; those do not count.

    Args:
        reader: its state must be of constant size.
        tokens: of the text, at least 2.
        tell: is called with the number of tokens read since it was called last.
        streams: as many as the text is long enough for, if absent.
    """
    targets = len(tokens) - 1
    rows, part, ahead = _streams(targets, streams)
    size = reader.steps(rows)
    firsts = np.arange(rows, dtype=np.int64)[:, None] * part
    sums = _Sums(reader.device, 64)
    # Where the document of a row's next input began; what lies before the text is no document.
    begun = np.array(
        [_begin(tokens, max(0, int(first) - ahead), reader.vocabulary.delimiter) for first in firsts[:, 0]]
    )
    state: State = None
    for start in range(-ahead, part, size):
        steps = np.arange(start, min(start + size, part) + 1)
        places = firsts + steps
        piece = tokens[places.clip(0, targets)]
        inputs, predicted = places[:, :-1], places[:, 1:]
        # The first token read is that of the text or of a document.
        starts = np.zeros(inputs.shape, dtype=np.bool_)
        starts[:, 1:] = piece[:, :-2] == reader.vocabulary.delimiter
        starts[:, 0] = inputs[:, 0] == begun
        starts |= inputs == 0
        began = np.maximum.accumulate(np.where(starts, inputs, begun[:, None]), axis=1)
        begun = np.where(piece[:, -2] == reader.vocabulary.delimiter, inputs[:, -1] + 1, began[:, -1])
        before = np.where(piece[:, :-1] == reader.vocabulary.delimiter, 0, predicted - began)
        counts = (steps[1:] > 0) & (predicted <= targets)
        reset = starts & (inputs >= 0) if reader.resets else inputs == 0
        losses, state = reader.read(piece, state, reset)
        sums.add(losses, np.where(counts, np.frexp(before)[1], -1), reader.vocabulary.lengths[piece[:, 1:]])
        tell(inputs.size)
    nats = sums.nats[:-1].cpu().numpy()
    total = HeldoutLoss(float(nats.sum() / targets), targets, int(sums.bytes.sum()))
    bins = [
        Bin(first, max(first, 2 * first - 1), int(count), float(loss / count), float(loss / size))
        for first, count, size, loss in zip(
            (0, *(1 << k for k in range(63))), sums.tokens, sums.bytes, nats, strict=True
        )
        if count
    ]
    return total, bins


def carried_cost(tokens: Tokens, streams: int | None = None) -> int:
    """Tokens that ``carried_loss`` reads."""
    rows, part, ahead = _streams(len(tokens) - 1, streams)
    return rows * (part + ahead)


def _streams(targets: int, rows: int | None) -> tuple[int, int, int]:
    """How many streams, the length of each's part, and how far ahead of that it starts."""
    rows = rows or max(1, min(_MOST_STREAMS, targets // _LEAST_PART))
    return rows, -(-targets // rows), WARM_UP if rows > 1 else 0


def _begin(tokens: Tokens, place: int, delimiter: int) -> int:
    """Where the document began that the token at ``place`` lies in."""
    for end in range(place, 0, -_CHUNK):
        found = np.flatnonzero(tokens[max(0, end - _CHUNK) : end] == delimiter)
        if len(found):
            return max(0, end - _CHUNK) + int(found[-1]) + 1
    return 0


def fitting_contexts(tokens: Tokens, contexts: Sequence[int]) -> list[int]:
    """Those that the text is long enough for."""
    return [context for context in contexts if context + TARGETS <= len(tokens)]


def context_cost(contexts: Sequence[int], rows: int) -> int:
    """Tokens that ``context_losses`` reads."""
    return rows * sum(context + TARGETS - 1 for context in contexts)


def context_rows(tokens: Tokens, contexts: Sequence[int], most: int) -> int:
    """Rows that ``context_losses`` spreads over the text: at most so many, and no target twice."""
    return max(1, min(most, (len(tokens) - max(contexts)) // TARGETS))


@torch.inference_mode()
def context_losses(reader: Reader, tokens: Tokens, contexts: Sequence[int], rows: int, tell: Tell) -> list[ContextLoss]:
    """Mean loss of the same tokens after contexts of several lengths, each read from rest.

    Rows are spread evenly over the text. So what differs between two lengths is the context alone.

    Args:
        reader: of any model.
        tokens: of the text.
        contexts: lengths, ``fitting_contexts`` of the text, at least one.
        rows: ``context_rows``.
        tell: as for ``carried_loss``.
    """
    longest = max(contexts)
    firsts = np.linspace(longest, len(tokens) - TARGETS, rows).astype(np.int64)  # of a row's targets
    found = []
    for context in contexts:
        nats, sizes = np.empty(rows), np.empty(rows)
        batch = max(1, min(rows, _CONTEXT_TOKENS // context))
        for top in range(0, rows, batch):
            some = slice(top, top + batch)
            windows = np.stack([tokens[first - context : first + TARGETS] for first in firsts[some]])
            state, pieces = None, []
            size = reader.steps(len(windows))
            for start in range(0, windows.shape[1] - 1, size):
                piece = windows[:, start : start + size + 1]
                reset = np.zeros((len(piece), piece.shape[1] - 1), dtype=np.bool_)
                if reader.resets:
                    reset[:, 1:] = piece[:, :-2] == reader.vocabulary.delimiter
                    reset[:, 0] = start > 0 and windows[:, start - 1] == reader.vocabulary.delimiter
                losses, state = reader.read(piece, state, reset)
                pieces.append(losses[:, max(0, context - 1 - start) :])
                tell(reset.size)
            nats[some] = torch.cat(pieces, dim=1).double().sum(1).cpu().numpy()
            sizes[some] = reader.vocabulary.lengths[windows[:, context:]].sum(1)
        # The mean is a ratio, of sums of nats and of bytes: what scatters is what a row is off by beside its bytes.
        spread = (nats - nats.sum() / sizes.sum() * sizes) / sizes.mean()
        error = float(spread.std(ddof=1) / np.sqrt(rows)) if rows > 1 else None
        count = rows * TARGETS
        found.append(ContextLoss(context, count, float(nats.sum() / count), float(nats.sum() / sizes.sum()), error))
    return found

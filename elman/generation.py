"""Sampling from a trained model, token by token: in constant memory, for what a recurrent model knows is its state."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from elman.capture import CudaRecorder, Recorder, Step
from elman.data.bytes import Bytes
from elman.data.vocabulary import BYTES, Tokens, Vocabulary
from elman.errors import UsageError
from elman.mixers import State
from elman.model import LanguageModel
from elman.ops import choosing_for_graphs
from elman.options import check_at_least

#: A prompt is read in pieces of so many tokens at most, and of so many logits in all.
_PREFILL = 4096
_PREFILL_LOGITS = 1 << 24
#: Bytes of a prompt that are made tokens at a time.
_ENCODED = 1 << 20
#: Plain steps before the capture: the first makes the state that is captured, the second loads what kernels need.
_WARM_UP_STEPS = 2
#: Steps that are prepared for at a time: numbers drawn, and room made, for states that grow.
_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn of logits.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draws from so many of the likeliest tokens; None from all.
        top_p: draws from the fewest likeliest tokens whose probabilities sum to at least this (Holtzman et al., 2020).
        seed: of the draws. What row i draws is a function of the seed, i and how many it drew before, whatever other
            rows there are.

    Raises:
        UsageError: a number out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"--temperature {self.temperature} is out of range: give a number from 0 to 100")
        check_at_least(self, top_k=1)
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p} is out of range: give a number above 0 and up to 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed} is out of range: give a number of at least 0 and below 2^63")

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One token a row, nothing being asked of the device. logits (B, V), uniform (B,) in [0, 1) -> (B,)."""
        if self.temperature < torch.finfo(torch.float32).tiny:  # which would divide by 0
            return logits.argmax(-1)
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
        # A token stays if those before it have not reached top_p yet; the likeliest always does.
        kept = probabilities.cumsum(-1) - probabilities < self.top_p
        kept[:, 0] = True
        if self.top_k is not None:
            kept[:, self.top_k :] = False
        reached = (probabilities * kept).cumsum(-1)
        rank = (reached <= uniform.unsqueeze(-1).to(reached.dtype) * reached[:, -1:]).sum(-1, keepdim=True)
        # Where rounding takes the number to the sum itself, the last that stayed.
        return order.gather(-1, rank.clamp(max=kept.sum(-1, keepdim=True) - 1)).squeeze(-1)

    def numbers(self, rows: int) -> Iterator[npt.NDArray[np.float32]]:
        """Without end, (_BLOCK, rows) of uniform numbers in [0, 1)."""
        streams = [np.random.Generator(np.random.Philox(key=[self.seed, row])) for row in range(rows)]
        while True:
            yield np.stack([stream.random(_BLOCK, dtype=np.float32) for stream in streams], axis=1)


class Decoder:
    """B texts that one model writes at a time, and its state behind each.

    A step draws a token a row and reads it; on a GPU, the step is captured in a CUDA graph where ``graph`` says so.
    The memory of recurrent models is constant, however long the texts. That of attention grows, by room for more tokens
    at a time, each time captured anew; a step then reads all of the room.

    Args:
        model: in evaluation mode, on the device that it shall run on.
        rows: B.
        sampling: how tokens are drawn.
        vocabulary: of the model's tokens.
        resets: whether a document's start resets a row's state, as it did in training.
        dtype: of autocast; None computes in the model's own.
        graph: whether steps are captured.

    Attributes:
        not_captured: what went wrong where a step was to be captured, and could not be; else None.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: int = 1,
        sampling: Sampling | None = None,
        *,
        vocabulary: Vocabulary = BYTES,
        resets: bool = False,
        dtype: torch.dtype | None = None,
        graph: bool = False,
    ) -> None:
        self.model, self.rows, self.resets = model, rows, resets
        self.sampling = Sampling() if sampling is None else sampling
        self.vocabulary = vocabulary
        self._device = model.embedding.weight.device
        self._dtype = dtype
        self._recorder: Recorder | None = CudaRecorder(self._device) if graph else None
        self.not_captured: str | None = None
        # Numbers that stand for no text are never drawn.
        self._empty = torch.from_numpy(vocabulary.lengths == 0).to(self._device)
        self._blocks, self._block, self._drawn = self.sampling.numbers(rows), torch.empty(0), 0
        self._uniform = torch.empty(rows, device=self._device)
        #: What the rows read last (B,), and its logits (B, V).
        self._last: Tensor | None = None
        self._logits: Tensor | None = None
        self._state: State = None
        # Steps that the state has room for, and those taken on the tensors that it lies in.
        self._room, self._settled = 0, 0
        self._replay: Step | None = None

    @property
    def has_read(self) -> bool:
        """Whether there is anything to go on from."""
        return self._logits is not None

    @property
    def captured(self) -> bool:
        """Whether steps are replayed now."""
        return self._replay is not None

    @property
    def state_bytes(self) -> int:
        """Memory of the state of all rows."""
        return sum(leaf.nbytes for leaf in tree_leaves(self._state))

    def change_state(self, change: Callable[[State], State], room: int) -> None:
        """Go on from another state, which has room for so many steps: for measurements."""
        self._state = change(self._state)
        self._room, self._settled, self._replay = room, 0, None

    @torch.inference_mode()
    def read(self, texts: Sequence[Bytes]) -> None:
        """Read a text a row, from where the row is. At first, nothing stands for the start of a document.

        Texts of all lengths, longer than memory too if they are mapped to it: they are read in pieces, and the state
        carried. Of several rows, all texts are made tokens first.
        """
        assert len(texts) == self.rows
        started = self.has_read
        start = np.array([self.vocabulary.delimiter])
        if self.rows == 1:
            pieces = _encode(texts[0], self.vocabulary) if len(texts[0]) else iter([start[:0] if started else start])
            for tokens in pieces:
                self._read([tokens])
            return
        rows = [
            np.concatenate(list(_encode(text, self.vocabulary))) if len(text) else start[:0] if started else start
            for text in texts
        ]
        if started and len({len(row) for row in rows}) > 1:
            raise UsageError("several texts that go on must be of the same number of tokens: write them one by one")
        self._read(rows)

    def _read(self, rows: Sequence[Tokens]) -> None:
        """Rows of unequal length are filled up in front, and start behind that from rest."""
        longest = max(map(len, rows))
        size = min(_PREFILL, max(1, _PREFILL_LOGITS // (self.rows * self.vocabulary.size)))
        fills = np.array([longest - len(row) for row in rows])
        for first in range(0, longest, size):
            end = min(first + size, longest)
            tokens = np.zeros((self.rows, end - first), dtype=np.int64)
            for row, fill, line in zip(rows, fills, tokens, strict=True):
                part = row[max(0, first - fill) : max(0, end - fill)]
                line[len(line) - len(part) :] = part
            reset = np.zeros(tokens.shape, dtype=np.bool_)
            if fills.any():
                starts = np.flatnonzero((first <= fills) & (fills < end))
                reset[starts, fills[starts] - first] = True
            if self.resets:
                reset[:, 1:] |= tokens[:, :-1] == self.vocabulary.delimiter
                reset[:, 0] |= (
                    True if self._last is None else (self._last == self.vocabulary.delimiter).numpy(force=True)
                )
            there = torch.from_numpy(tokens).to(self._device)
            self._run(there, torch.from_numpy(reset).to(self._device) if reset.any() else None)

    def _run(self, tokens: Tensor, reset: Tensor | None) -> None:
        if self._room:
            self._state = self.model.reserve(self._state, tokens.shape[1])
        with self._autocast():
            logits, self._state = self.model(tokens, self._state, reset)
        self._logits, self._last = logits[:, -1].clone(), tokens[:, -1].clone()
        self._room, self._settled, self._replay = 0, 0, None

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Draw a token a row and read it. Returns them, (B,), in memory that the next step may write to."""
        assert self._logits is not None, "nothing was read"
        if self._drawn % _BLOCK == 0:
            self._block = torch.from_numpy(next(self._blocks)).to(self._device)
        self._uniform.copy_(self._block[self._drawn % _BLOCK])
        self._drawn += 1
        if not self._room:
            self._make_room()
        self._room -= 1
        if self._recorder is None:
            return self._advance()
        with choosing_for_graphs():
            if self._replay is None and self._settled >= _WARM_UP_STEPS:
                self._replay = self._capture(self._recorder)
                if self._replay is None:
                    return self._advance()
            if self._replay is not None:
                return self._replay()
            self._settled += 1
            return self._recorder.run(self._advance if self._settled == 1 else self._advance_in_place)

    def _capture(self, recorder: Recorder) -> Step | None:
        """A step, captured; None where that cannot be done: then steps are taken plainly from now on."""
        try:
            return recorder.record(self._advance_in_place)
        except RuntimeError as error:
            self.not_captured = str(error).strip().partition("\n")[0]
            self._recorder = None
            return None

    def _make_room(self) -> None:
        """For as many steps as were taken, so that what is moved and captured anew for it is little in the end."""
        self._room = max(_BLOCK, 1 << self._drawn.bit_length())
        before = tree_leaves(self._state)
        self._state = self.model.reserve(self._state, self._room)
        after = tree_leaves(self._state)
        if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
            self._settled, self._replay = 0, None

    def _advance(self) -> Tensor:
        """A step, whose state and logits are new."""
        tokens, self._logits, state = self._next()
        if self._recorder is not None:
            # What later steps write to must be no part of a larger tensor, or of each other.
            old = {id(leaf) for leaf in tree_leaves(self._state)}
            state = tree_map(lambda leaf: leaf if id(leaf) in old else leaf.clone(), state)
        self._last, self._state = tokens, state
        return tokens

    def _advance_in_place(self) -> Tensor:
        """A step that leaves state and logits where it found them."""
        assert self._logits is not None
        assert self._last is not None
        tokens, logits, state = self._next()
        self._last.copy_(tokens)
        self._logits.copy_(logits)
        places, values = tree_leaves(self._state), tree_leaves(state)
        for place, value in zip(places, values, strict=True):
            assert place.shape == value.shape
            if place is not value:
                place.copy_(value)
        return self._last

    def _next(self) -> tuple[Tensor, Tensor, State]:
        assert self._logits is not None
        assert self._last is not None
        tokens = self.sampling.draw(self._logits.masked_fill(self._empty, -torch.inf), self._uniform)
        reset = (self._last == self.vocabulary.delimiter).unsqueeze(1) if self.resets else None
        with self._autocast():
            logits, state = self.model(tokens.unsqueeze(1), self._state, reset)
        return tokens, logits[:, -1], state

    def _autocast(self) -> AbstractContextManager[None]:
        if self._dtype is None:
            return contextlib.nullcontext()
        # Weights that are cast are not kept: what a graph captures must not lie in a cache that is emptied.
        return torch.autocast(self._device.type, self._dtype, cache_enabled=False)

    def write(self) -> Iterator[list[bytes]]:
        """Without end, what a step writes: the bytes of a token a row."""
        while True:
            yield [self.vocabulary.pieces[token] for token in self.step().tolist()]


def _encode(text: Bytes, vocabulary: Vocabulary) -> Iterator[Tokens]:
    """The tokens of a text, piece by piece; a token never spans two pieces."""
    first = 0
    while first < len(text):
        end = first + _ENCODED
        end = vocabulary.first_start(text, end) if end < len(text) else len(text)
        yield vocabulary.encode(text[first:end])
        first = end


def as_bytes(text: bytes) -> Bytes:
    """A text as arrays of bytes are passed around here."""
    return np.frombuffer(text, dtype=np.uint8)


def generate(
    model: LanguageModel,
    prompt: bytes,
    num_bytes: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
    vocabulary: Vocabulary = BYTES,
    resets: bool = False,
) -> Iterator[int]:
    """Draw ``num_bytes`` bytes that follow ``prompt``, yielding each as soon as it is drawn.

    Only the model's state is kept from token to token. An empty prompt stands for the start of a document. For several
    texts at a time, for captured steps, and to go on after more was read, see ``Decoder``.

    Args:
        model: it runs on the device that it lies on.
        prompt: raw bytes.
        num_bytes: how many to draw, at least 0.
        temperature: as for ``Sampling``, like those that follow.
        top_k: see there.
        top_p: see there.
        seed: see there.
        vocabulary: of the model's tokens.
        resets: whether a document's start resets the model's state, as it did in training.

    Raises:
        UsageError: a number out of range.
        TypeError: the prompt is not bytes.
    """
    check_bytes(num_bytes)
    text = as_bytes(prompt)
    decoder = Decoder(model, 1, Sampling(temperature, top_k, top_p, seed), vocabulary=vocabulary, resets=resets)

    def pieces() -> Iterator[bytes]:
        decoder.read([text])
        for (piece,) in decoder.write():
            yield piece

    return itertools.islice(itertools.chain.from_iterable(pieces()), num_bytes)


def check_bytes(num_bytes: int) -> None:
    """A number of bytes to write.

    Raises:
        UsageError: it is out of range.
    """
    if not 0 <= num_bytes <= 2**53:
        raise UsageError(f"--bytes {num_bytes} is out of range: give a number from 0 to {2**53}")

"""Sampling from a trained model, token by token, in constant memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from elman.data.sampling import document_starts
from elman.data.vocabulary import BYTES, Vocabulary
from elman.errors import UsageError
from elman.model import LanguageModel
from elman.options import flag

_PREFILL = 4096


def generate(
    model: LanguageModel,
    prompt: bytes,
    num_bytes: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    vocabulary: Vocabulary = BYTES,
    resets: bool = False,
) -> Iterator[int]:
    """Draw ``num_bytes`` bytes that follow ``prompt``, yielding each as soon as it is drawn.

    Only the model's state is kept from token to token. An empty prompt stands for the start of a document.

    Args:
        model: it runs on the device that it lies on.
        prompt: raw bytes.
        num_bytes: how many to draw, at least 0.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: draws from the fewest likeliest tokens whose probabilities sum to at least this (Holtzman et al., 2020).
        seed: of the draws.
        vocabulary: of the model's tokens.
        resets: whether a document's start resets the model's state, as it did in training.

    Raises:
        UsageError: a number out of range.
    """
    for name, value, least, most in (("bytes", num_bytes, 0, 2**53), ("temperature", temperature, 0, 100)):
        if not least <= value <= most:
            raise UsageError(f"{flag(name)} {value} is out of range: give a number from {least} to {most}")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p} is out of range: give a number above 0 and up to 1")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed} is out of range: give a number of at least 0 and below 2^63")
    tokens = _generate(model, prompt, temperature, top_p, seed, vocabulary, resets)
    return itertools.islice(itertools.chain.from_iterable(map(vocabulary.pieces.__getitem__, tokens)), num_bytes)


@torch.inference_mode()
def _generate(
    model: LanguageModel,
    prompt: bytes,
    temperature: float,
    top_p: float,
    seed: int,
    vocabulary: Vocabulary,
    resets: bool,
) -> Iterator[int]:
    """Tokens without end."""
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    # Numbers that stand for no text are never drawn.
    empty = torch.from_numpy(vocabulary.lengths == 0).to(device)
    prefix = vocabulary.encode(np.frombuffer(prompt, dtype=np.uint8)) if prompt else np.array([vocabulary.delimiter])
    tokens = torch.from_numpy(prefix.astype(np.int64)).to(device)
    state, starts_document = None, True
    while True:
        for chunk in torch.split(tokens, _PREFILL):
            reset = None
            if resets:
                row = [*chunk.tolist(), 0]
                reset = torch.from_numpy(document_starts(np.array([row]), starts_document, vocabulary.delimiter))
                reset, starts_document = reset.to(device), row[-2] == vocabulary.delimiter
            logits, state = model(chunk[None], state, reset)
        scores = logits[0, -1].float().masked_fill(empty, -torch.inf)
        tokens = _draw(scores, temperature, top_p, generator)
        yield int(tokens)


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token, as a tensor of shape (1,)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
    # A token stays if those before it have not reached top_p yet.
    kept = probabilities.cumsum(-1) - probabilities < top_p
    kept[0] = True
    return order[torch.multinomial(probabilities * kept, 1, generator=generator)]

"""Sampling from a trained model, byte by byte, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elman.data.bytes import DELIMITER
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
) -> Iterator[int]:
    """Draw ``num_bytes`` bytes that follow ``prompt``, yielding each as soon as it is drawn.

    Only the model's state is kept from byte to byte. An empty prompt stands for the start of a document.

    Args:
        model: a byte-level model; it runs on the device that it lies on.
        prompt: raw bytes.
        num_bytes: how many to draw, at least 0.
        temperature: divides the logits; 0 always takes the likeliest byte.
        top_p: draws from the fewest likeliest bytes whose probabilities sum to at least this (Holtzman et al., 2020).
        seed: of the draws.

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
    return _generate(model, prompt, num_bytes, temperature, top_p, seed)


@torch.inference_mode()
def _generate(
    model: LanguageModel, prompt: bytes, num_bytes: int, temperature: float, top_p: float, seed: int
) -> Iterator[int]:
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.frombuffer(bytearray(prompt or bytes([DELIMITER])), dtype=torch.uint8).to(device)
    state = None
    for _ in range(num_bytes):
        for chunk in torch.split(tokens, _PREFILL):
            logits, state = model(chunk[None], state)
        tokens = _draw(logits[0, -1].float(), temperature, top_p, generator)
        yield int(tokens)


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token, as a tensor of shape (1,)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
    # A byte stays if those before it have not reached top_p yet.
    kept = probabilities.cumsum(-1) - probabilities < top_p
    kept[0] = True
    return order[torch.multinomial(probabilities * kept, 1, generator=generator)]

"""Sampling from a trained model, byte by byte, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elman.data.bytes import DELIMITER
from elman.errors import UsageError
from elman.model import LanguageModel

_PREFILL = 4096


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: bytes,
    num_bytes: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[int]:
    """Yield ``num_bytes`` bytes that follow ``prompt``, each as soon as it is drawn.

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
    if num_bytes < 0:
        raise UsageError(f"--bytes {num_bytes} is out of range: give a number of at least 0")
    if not 0 <= temperature < 100:
        raise UsageError(f"--temperature {temperature} is out of range: give a number of at least 0, such as 0.8")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p} is out of range: give a number above 0 and up to 1")
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.frombuffer(bytearray(prompt or bytes([DELIMITER])), dtype=torch.uint8).to(device)
    state = None
    for chunk in torch.split(tokens, _PREFILL):
        logits, state = model(chunk[None], state)
    for _ in range(num_bytes):
        token = _draw(logits[0, -1].float(), temperature, top_p, generator)
        yield int(token)
        logits, state = model(token.view(1, 1), state)


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax()
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
    # A byte stays if those before it have not reached top_p yet, so the likeliest always stays.
    probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < top_p)
    return order[torch.multinomial(probabilities, 1, generator=generator)][0]


def readable(text: bytes) -> str:
    """Bytes for a terminal: broken UTF-8 replaced, the document delimiter shown as its Unicode picture."""
    return text.decode("utf-8", "replace").translate(_PICTURES)


# Control characters but for tab and newline move the cursor or worse: show their pictures. C1 controls have none.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_PICTURES |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)

"""A small tiktoken encoding made up here, as the real ones are downloaded."""

from typing import Any

import pytest

tiktoken = pytest.importorskip("tiktoken")

NAME = "tiny_for_tests"
_WORDS = ["th", "he", "the", "qu", "ck", "ro", "fo", "fox", "er", "ov"]
# The words of GPT-2, which lets a delimiter stand in one word with the punctuation around it.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def constructor() -> dict[str, Any]:
    ranks = {bytes([byte]): 255 - byte for byte in range(256)}
    ranks |= {word.encode(): 256 + i for i, word in enumerate([*_WORDS, ".\x1e", "é", " t", " the"])}
    # As in cl100k_base, the special token lies behind numbers that stand for nothing.
    return {
        "name": NAME,
        "pat_str": _PATTERN,
        "mergeable_ranks": ranks,
        "special_tokens": {"<|endoftext|>": 300},
    }


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the encoding, registered for this test."""
    tiktoken.list_encoding_names()
    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, NAME, constructor)
    return NAME

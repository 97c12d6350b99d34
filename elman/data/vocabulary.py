"""What a token is: a byte of the raw file, or a piece of text as a tiktoken encoding cuts it."""

from __future__ import annotations

import functools
import importlib
import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from elman.data.bytes import DELIMITER, Bytes
from elman.errors import UsageError

Tokens = npt.NDArray[Any]

# Bytes that are tokens by themselves: the delimiter, so that documents never share one, and what is no UTF-8.
_ALONE = re.compile(f"([{chr(DELIMITER)}\udc80-\udcff])")
# tiktoken's regular expressions overflow their stack on a million spaces: it is given at most this much at a time.
_PIECE = 1 << 16


class Vocabulary(ABC):
    """Tokens and the bytes that they stand for.

    Attributes:
        unit: what a token is called.
        pieces: V byte strings, those of the tokens 0 to V - 1; empty where a number stands for no text.
        delimiter: the token that ends a document, the byte 0x1e alone.
        bytes_per_token: about how many to read for a token.
        lookahead: tokens at the end of a text which may be others where the text goes on.
    """

    unit: ClassVar[str]
    bytes_per_token: ClassVar[int] = 1
    lookahead: ClassVar[int] = 0
    pieces: list[bytes]
    delimiter: int

    @property
    def size(self) -> int:
        """V."""
        return len(self.pieces)

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(V,), bytes a token."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    @abstractmethod
    def encode(self, text: Bytes) -> Tokens:
        """The tokens of a text; their pieces joined are the text, byte for byte."""

    def first_start(self, data: Bytes, offset: int) -> int:
        """The first place from ``offset`` on where a text may start."""
        return offset


class ByteVocabulary(Vocabulary):
    """Each byte is a token."""

    unit = "byte"
    delimiter = DELIMITER

    def __init__(self) -> None:
        self.pieces = [bytes([byte]) for byte in range(256)]

    def encode(self, text: Bytes) -> Tokens:
        return text


class TiktokenVocabulary(Vocabulary):
    """Tokens of a ``tiktoken.Encoding`` without its special ones.

    V is its size rounded up to a multiple of 8, which matrix products on GPUs need to be fast; what is added stands for
    no text.
    """

    unit = "token"
    bytes_per_token = 5
    lookahead = 16

    def __init__(self, encoding: Any) -> None:
        self.encoding = encoding
        self.pieces = [b""] * (-(-encoding.n_vocab // 8) * 8)
        for piece in encoding.token_byte_values():
            self.pieces[encoding.encode_single_token(piece)] = piece
        self._alone = [encoding.encode_single_token(bytes([byte])) for byte in range(256)]
        self.delimiter = self._alone[DELIMITER]

    def encode(self, text: Bytes) -> Tokens:
        tokens: list[int] = []
        for i, part in enumerate(_ALONE.split(text.tobytes().decode("utf-8", "surrogateescape"))):
            if i % 2:
                tokens.append(self._alone[part.encode("utf-8", "surrogateescape")[0]])
            else:
                for first in range(0, len(part), _PIECE):
                    tokens += self.encoding.encode_ordinary(part[first : first + _PIECE])
        return np.array(tokens, dtype=np.int32)

    def first_start(self, data: Bytes, offset: int) -> int:
        # A UTF-8 character has at most three bytes behind its first.
        for start in range(offset, min(offset + 3, len(data))):
            if data[start] & 0xC0 != 0x80:
                return start
        return min(offset + 3, len(data) - 1)


BYTES = ByteVocabulary()


def open_vocabulary(tokenizer: str | None) -> Vocabulary:
    """Bytes, or the tiktoken encoding of a name, which tiktoken downloads at its first use.

    Raises:
        UsageError: no tiktoken, no such encoding, or it cannot be downloaded.
    """
    return BYTES if tokenizer is None else _open_tiktoken(tokenizer)


@functools.cache
def _open_tiktoken(name: str) -> Vocabulary:
    try:
        tiktoken = importlib.import_module("tiktoken")
    except ImportError as error:
        raise UsageError(f"--tokenizer {name} needs the package tiktoken ({error}): pip install tiktoken") from None
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UsageError(f"--tokenizer {name!r} is unknown: choose one of tiktoken's, {', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--tokenizer {name} cannot be loaded ({type(error).__name__}): tiktoken downloads it at its first use, so "
            f"run once with a network, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from None
    try:
        return TiktokenVocabulary(encoding)
    except KeyError:
        raise UsageError(f"--tokenizer {name} has no token for some bytes: choose a byte-level encoding") from None

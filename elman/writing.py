"""``elman generate``: prompts in, texts out, as files, pipes and terminals take them."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from elman.data.bytes import DELIMITER, Bytes, map_bytes
from elman.environment import resolve_device
from elman.errors import UsageError
from elman.generation import Decoder, Sampling, as_bytes, check_bytes
from elman.inference import advise_on_memory, autocast_dtype, freeze
from elman.model import LanguageModel
from elman.text import one_line, readable
from elman.training.run import load_model, load_text

_PROMPT = "> "
#: Bytes that a terminal is given at a time.
_SHOWN = 1 << 16


@dataclass(frozen=True)
class Request:
    """What ``elman generate`` was asked for; see its options.

    Attributes:
        sampling: the fields of ``Sampling``.
    """

    run: Path
    prompts: tuple[str, ...] = ()
    prompt_files: tuple[Path, ...] = ()
    interactive: bool = False
    num_bytes: int = 500
    sampling: tuple[float, int | None, float, int] = (0.8, None, 0.95, 0)
    precision: str = "auto"
    graph: str = "auto"
    device: str = "auto"


def generate(request: Request, out: TextIO | None) -> int:
    """Write prompts and what follows them to ``out``: raw bytes to a file or pipe, readable text to a terminal.

    Of several, each begins with a line of its own on a terminal, and ends with the byte 0x1e elsewhere.
    """
    if out is None:
        raise UsageError("standard output is closed: send it to a file or a terminal")
    check_bytes(request.num_bytes)
    sampling = Sampling(*request.sampling)
    prompts = _prompts(request)
    if request.interactive and len(prompts) > 1:
        raise UsageError(f"--interactive writes one text, but {len(prompts)} prompts were given: give one, or none")
    asked = f"{len(prompts)} prompts of up to {max(map(len, prompts)):,} bytes, --bytes {request.num_bytes}"
    with advise_on_memory(asked, "give fewer of them, shorter ones or fewer bytes"):
        return _generate(request, prompts, sampling, out)


def _generate(request: Request, prompts: list[Bytes], sampling: Sampling, out: TextIO) -> int:
    decoder = open_decoder(
        request.run, len(prompts), sampling, precision=request.precision, graph=request.graph, device=request.device
    )
    sink = _Terminal(out) if out.isatty() else _Raw(out)
    if request.interactive:
        return _converse(decoder, prompts[0], request.num_bytes, sink)
    decoder.read(prompts)
    if len(prompts) == 1:
        sink.put(prompts[0])
        for piece in _write(decoder, request.num_bytes):
            sink.put(as_bytes(piece))
        sink.end()
        return 0
    texts = [bytearray() for _ in prompts]
    for pieces in decoder.write() if request.num_bytes else ():
        for text, piece in zip(texts, pieces, strict=True):
            text += piece
        if min(map(len, texts)) >= request.num_bytes:
            break
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        sink.begin(f"── {i + 1} of {len(texts)} ──")
        sink.put(prompt)
        sink.put(as_bytes(bytes(text[: request.num_bytes])))
        sink.end(delimited=True)
    return 0


def open_decoder(
    run: Path, rows: int, sampling: Sampling, *, precision: str = "auto", graph: str = "auto", device: str = "auto"
) -> Decoder:
    """The model of a run, ready to write ``rows`` texts.

    Raises:
        UsageError: no such device, no run there, or it has no model yet.
    """
    where = resolve_device(device)
    dtype = autocast_dtype(precision, where)
    model = load_model(run, lambda line: print(one_line(line), file=sys.stderr))
    vocabulary, resets = load_text(run)
    captured = graph == "auto" and where.type == "cuda" and is_capturable(model)
    model = freeze(model.to(where), dtype)
    return Decoder(model, rows, sampling, vocabulary=vocabulary, resets=resets, dtype=dtype, graph=captured)


def is_capturable(model: LanguageModel) -> bool:
    """Whether a step of the model may be captured in a CUDA graph: layers of other packages may ask the host."""
    return not any(mixer.name.startswith("fla:") for mixer in model.config.mixers)


def _prompts(request: Request) -> list[Bytes]:
    prompts = [as_bytes(os.fsencode(prompt)) for prompt in request.prompts]
    prompts += [map_bytes(file, "--prompt-file") for file in request.prompt_files]
    return prompts or [as_bytes(b"")]


def _write(decoder: Decoder, num_bytes: int) -> Iterator[bytes]:
    """What one row writes, cut after so many bytes: of a longer token, the rest is read but not shown."""
    if num_bytes:
        for (piece,) in decoder.write():
            yield piece[:num_bytes]
            num_bytes -= len(piece)
            if num_bytes <= 0:
                return


def _converse(decoder: Decoder, prompt: Bytes, num_bytes: int, sink: _Raw | _Terminal) -> int:
    """Turns, until there is no more input: a line is read, and the model writes on, from the state that it was in.

    A turn ends early at a document's end, which is where a text in the training data would. So does one by Ctrl-C.
    """
    delimiter = decoder.vocabulary.pieces[decoder.vocabulary.delimiter]
    first = True
    for line in _lines():
        text = line
        if first:
            text, first = prompt.tobytes() + line, False
        if len(text):
            decoder.read([as_bytes(text)])
        elif not decoder.has_read:
            decoder.read([as_bytes(b"")])
        with contextlib.suppress(KeyboardInterrupt):
            for piece in _write(decoder, num_bytes):
                if piece == delimiter:
                    break
                sink.put(as_bytes(piece))
        sink.end(delimited=True)
    return 0


def _lines() -> Iterator[bytes]:
    """Lines of the input with their ends, an empty one being no text; on a terminal, asked for and editable."""
    if sys.stdin is None:
        raise UsageError("--interactive: standard input is closed: give a terminal, a file or a pipe")
    if not sys.stdin.isatty():
        yield from (line if line != b"\n" else b"" for line in sys.stdin.buffer)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  makes input() editable
    print("Type a line; an empty one lets the model go on. Ctrl-C ends its turn, Ctrl-D ends.", file=sys.stderr)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input(_PROMPT)
            yield os.fsencode(line) + b"\n" if line else b""
    print(file=sys.stderr)


class _Raw:
    """Bytes as they are."""

    def __init__(self, out: TextIO) -> None:
        self._sink = out.buffer
        self._out = out

    def begin(self, title: str) -> None:
        pass

    def put(self, text: Bytes) -> None:
        self._sink.write(text.data)
        self._sink.flush()

    def end(self, delimited: bool = False) -> None:
        if delimited:
            self._sink.write(bytes([DELIMITER]))
        self._sink.flush()


class _Terminal:
    """UTF-8 characters arrive in pieces: an incremental decoder shows each once it is whole."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def begin(self, title: str) -> None:
        self._out.write(title + "\n")

    def put(self, text: Bytes) -> None:
        for first in range(0, len(text), _SHOWN):
            self._out.write(readable(self._decoder.decode(text[first : first + _SHOWN].tobytes())))
            self._out.flush()

    def end(self, delimited: bool = False) -> None:
        self._out.write(readable(self._decoder.decode(b"", final=True)) + "\n")
        self._decoder.reset()
        self._out.flush()

"""Files and folders of text into one raw file of documents, each ended by 0x1e.

Streams: memory holds a piece of a file at a time, or one line of a .jsonl file.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from elman.data.bytes import DELIMITER
from elman.errors import UsageError

_CHUNK = 1 << 20
_DELIMITER = bytes([DELIMITER])
_JSONL = (".jsonl", ".ndjson")

#: Opens a file to read its bytes; a caller that shows progress gives one that counts them.
Opener = Callable[[Path], IO[bytes]]


@dataclass
class PackSummary:
    """What went into a packed file."""

    documents: int = 0
    bytes: int = 0
    replaced: int = 0
    """Delimiter bytes inside the texts of JSON lines and data sets, replaced by a space."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Files, lines and rows left out, by reason."""

    def skip(self, reason: str) -> None:
        """Count one more thing left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def find_files(paths: list[Path], keep: Callable[[Path], bool] = lambda path: True) -> list[Path]:
    """The files under ``paths``, in an order fixed by a hash of their paths.

    Hidden files and folders are left out, and folders behind a symbolic link.

    The hashed order makes any part of the packed file, its tail among them, a fair sample of the whole.

    Raises:
        UsageError: a path is not there, a folder cannot be read, or nothing is left.
    """
    found: dict[Path, str] = {}
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path, onerror=_unreadable_folder):
                folders[:] = [name for name in folders if not name.startswith(".")]
                for name in names:
                    file = Path(folder, name)
                    if not name.startswith(".") and file.is_file() and keep(file):
                        found.setdefault(file, file.relative_to(path).as_posix())
        elif path.is_file():
            found.setdefault(path, path.name)
        elif path.exists():
            raise UsageError(f"PATH {path} is no regular file: write its text to a file first")
        else:
            raise UsageError(f"PATH {path}: no such file or folder; check the path")
    if not found:
        raise UsageError(f"PATH {' '.join(map(str, paths))} has no files to pack; name a folder that has")
    return sorted(
        found, key=lambda file: (hashlib.sha256(found[file].encode("utf-8", "surrogateescape")).digest(), file)
    )


def _unreadable_folder(error: OSError) -> None:
    raise UsageError(f"PATH {error.filename} cannot be read: {error.strerror}; mend its permissions or leave it out")


def pack(
    files: list[Path],
    out: Path,
    *,
    text_field: str = "text",
    skip_bad: bool = False,
    open_file: Opener = lambda path: path.open("rb"),
) -> PackSummary:
    """Write the documents of ``files`` into ``out``, whole or not at all.

    A plain or gzipped file is one document of raw bytes, or several where it holds delimiters already, as a packed file
    does; a .jsonl, .ndjson file (gzipped too) has one a line. Files
    with a NUL byte near their start are taken for binary and left out, and so are empty documents.

    Raises:
        UsageError: ``out`` exists already or cannot be written, or, unless ``skip_bad``, a file is broken or a line
            of JSON has no text in ``text_field``.
    """
    summary = PackSummary()
    _write(
        (document for file in files for document in _documents(file, text_field, skip_bad, summary, open_file)),
        out,
        summary,
    )
    return summary


def pack_texts(texts: Iterable[str], out: Path, summary: PackSummary) -> None:
    """Write ``texts``, a document each, into ``out`` and count them in ``summary``; errors as in ``pack``."""
    _write((iter([_clean(text, summary)]) for text in texts), out, summary)


def check_out(out: Path) -> None:
    """Nothing is there yet.

    Raises:
        UsageError: something is.
    """
    if os.path.lexists(out):
        raise UsageError(f"--out {out} exists already and is left as it is: give another name, or remove it first")


def _write(documents: Iterable[Iterator[bytes]], out: Path, summary: PackSummary) -> None:
    """The documents, each as chunks, into ``out``, whole or not at all."""
    check_out(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as sink:
            for document in documents:
                _write_document(document, sink, summary)
            sink.flush()
            os.fsync(sink.fileno())
        if not summary.documents:
            raise UsageError(f"nothing to pack: {_reasons(summary)}; name files that hold text")
        # A link fails where its name is taken, by another packer that was faster, say; a rename would not.
        try:
            os.link(partial, out)
        except FileExistsError:
            check_out(out)
            raise
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _reasons(summary: PackSummary) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in summary.skipped.items()) or "no files"


def _write_document(chunks: Iterator[bytes], sink: IO[bytes], summary: PackSummary) -> None:
    """One document, or several where the file has delimiters already."""
    size, last = 0, b""
    for chunk in chunks:
        summary.documents += chunk.count(_DELIMITER)
        sink.write(chunk)
        size, last = size + len(chunk), chunk[-1:]
    if not size:
        summary.skip("empty documents")
    elif last != _DELIMITER:
        sink.write(_DELIMITER)
        summary.documents += 1
        size += 1
    summary.bytes += size


def _documents(
    file: Path, text_field: str, skip_bad: bool, summary: PackSummary, open_file: Opener
) -> Iterator[Iterator[bytes]]:
    """Each document of a file, as chunks."""
    packed = file.suffix.lower() == ".gz"
    name = (file.with_suffix("") if packed else file).name.lower()
    with contextlib.ExitStack() as stack, _named_errors(file):
        source = stack.enter_context(open_file(file))
        if packed:
            source = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=source, mode="rb")))
        if name.endswith(_JSONL):
            for number, line in enumerate(source, start=1):
                document = _json_text(file, number, line, text_field, skip_bad, summary)
                if document is not None:
                    yield iter([document])
        else:
            first = source.read(_CHUNK)
            if b"\0" in first[:8192]:
                summary.skip("binary files")
            else:
                yield _chunks(first, source, file)


def _chunks(first: bytes, source: IO[bytes], file: Path) -> Iterator[bytes]:
    chunk = first
    while chunk:
        yield chunk
        with _named_errors(file):
            chunk = source.read(_CHUNK)


@contextlib.contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Errors in reading ``file`` become errors that name it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{file} is broken: {error}; mend it or leave it out") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}; mend it or leave it out") from None


def _clean(text: str, summary: PackSummary) -> bytes:
    """A text as one document: delimiters in it become spaces."""
    document = text.encode("utf-8", "surrogatepass")
    summary.replaced += document.count(_DELIMITER)
    return document.replace(_DELIMITER, b" ")


def _json_text(
    file: Path, number: int, line: bytes, text_field: str, skip_bad: bool, summary: PackSummary
) -> bytes | None:
    if not line.strip():
        return None
    try:
        text = json.loads(line)[text_field]
        if isinstance(text, str):
            return _clean(text, summary)
        problem = f"has no text in field {text_field!r}"
    except KeyError:
        problem = f"has no field {text_field!r}"
    except (ValueError, TypeError, RecursionError):
        problem = "is no JSON object"
    if not skip_bad:
        raise UsageError(f"{file}, line {number}, {problem}: give --field NAME, or leave such lines out by --skip-bad")
    summary.skip("bad lines of JSON")
    return None

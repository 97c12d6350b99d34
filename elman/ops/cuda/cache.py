"""Compiled kernels on disk: one file an entry, safe among processes that share the folder.

An entry is written to a temporary name and renamed when whole, so a reader sees all of it or none, and carries its own
checksum, so one that a full disk or a crash has spoilt counts as absent. Two processes that compile the same kernel at
once both write it; the last one wins, with the same content.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

from elman.cache import cache_folder

_MAGIC = b"elman kernel 1\n"


def kernel_folder() -> Path | None:
    """The folder of compiled kernels; None where the cache is off."""
    folder = cache_folder()
    return None if folder is None else folder / "kernels"


def load(key: str) -> bytes | None:
    """The entry of this name, or None where there is none that is whole."""
    folder = kernel_folder()
    if folder is None:
        return None
    try:
        data = (folder / key).read_bytes()
    except OSError:
        return None
    head, payload = data[: len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
    return payload if head == _head(payload) else None


def store(key: str, payload: bytes) -> None:
    """Keeps an entry. Where the folder cannot be written, warns once a process and keeps nothing."""
    folder = kernel_folder()
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{key}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_head(payload) + payload)
            os.replace(temporary, folder / key)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        _warn_once(
            f"elman cannot keep compiled kernels in {folder} ({error.strerror or error}), so every process compiles "
            "them anew: set ELMAN_CACHE to a folder that can be written, or to off"
        )


def _head(payload: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(payload).digest()


_warned = False


def _warn_once(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, RuntimeWarning, stacklevel=2)

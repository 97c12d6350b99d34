"""Real text that every machine has: the source files of Python's standard library, packed once."""

from __future__ import annotations

import contextlib
import os
import platform
import sysconfig
from pathlib import Path

from elman.cache import cache_folder
from elman.data.pack import Opener, find_files, pack
from elman.errors import UsageError


def stdlib_path() -> Path:
    """Where the packed file lies, or will: one for each Python version.

    Raises:
        UsageError: there is no cache folder.
    """
    folder = cache_folder()
    if folder is None:
        raise UsageError("the demo text has no place to lie: set ELMAN_CACHE to a folder, or give --data FILE")
    return folder / "data" / f"python-{platform.python_version()}-stdlib.txt"


def stdlib_files() -> list[Path]:
    """The standard library's .py files, about 11 MB.

    Left out are packages installed beside it, its tests, and the tables of code pages, whose thousands of like lines
    would make the training loss look better than what is learned.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    return find_files([folder], lambda f: f.suffix == ".py" and left_out.isdisjoint(f.relative_to(folder).parts))


def pack_stdlib(files: list[Path], open_file: Opener) -> Path:
    """Pack ``files`` to ``stdlib_path()``. Processes that do so at once end with the same whole file.

    Raises:
        UsageError: the cache folder cannot be written.
    """
    path = stdlib_path()
    mine = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        pack(files, mine, open_file=open_file)
        mine.replace(path)
    except (UsageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).partition(": ")[2]
        raise UsageError(
            f"the demo text cannot be written to {path}: {reason}; "
            f"set ELMAN_CACHE to a folder that can be written, or give --data FILE"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            mine.unlink()
    return path

"""The kernels on disk: other processes, broken entries, folders that cannot be written."""

import errno
import os
import warnings
from pathlib import Path

import pytest

from elman.ops.cuda import cache
from tests.ops.cuda.processes import start_together

KEY = "0123abcd"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_warned", False)
    return tmp_path / "kernels"


def test_gives_back_what_was_stored(folder: Path) -> None:
    assert cache.load(KEY) is None
    cache.store(KEY, b"payload")
    assert cache.load(KEY) == b"payload"
    cache.store(KEY, b"another")
    assert cache.load(KEY) == b"another"
    assert os.listdir(folder) == [KEY]


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data + b"x"])
def test_a_half_written_entry_counts_as_absent(folder: Path, spoil) -> None:
    cache.store(KEY, b"payload" * 100)
    entry = folder / KEY
    entry.write_bytes(spoil(entry.read_bytes()))
    assert cache.load(KEY) is None
    cache.store(KEY, b"whole")
    assert cache.load(KEY) == b"whole"


def test_an_entry_with_one_wrong_bit_counts_as_absent(folder: Path) -> None:
    cache.store(KEY, b"payload" * 100)
    data = (folder / KEY).read_bytes()
    for at in range(0, len(data), 37):
        (folder / KEY).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert cache.load(KEY) is None


def test_a_process_killed_while_writing_leaves_nothing_that_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        cache.store(KEY, b"payload")
    assert cache.load(KEY) is None
    assert os.listdir(folder) == []


def test_many_processes_write_one_entry(folder: Path) -> None:
    code = f"for i in range(200): cache.store({KEY!r}, bytes([i]) * 100_000); assert cache.load({KEY!r}) is not None"
    writers = start_together("from elman.ops.cuda import cache", code, 3)
    while writers.poll() is None:
        payload = cache.load(KEY)
        assert payload is None or (len(payload) == 100_000 and len(set(payload)) == 1)
    assert writers.returncode == 0
    assert os.listdir(folder) == [KEY]


def test_off_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELMAN_CACHE", "off")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cache.store(KEY, b"payload")
    assert cache.kernel_folder() is None
    assert cache.load(KEY) is None
    assert list(tmp_path.iterdir()) == []


def test_default_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELMAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.kernel_folder() == Path("/xdg/elman/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert cache.kernel_folder() == Path("/home/ann/.cache/elman/kernels")
    monkeypatch.setenv("ELMAN_CACHE", "~/kept")
    assert cache.cache_folder() == Path("/home/ann/kept")


def test_a_folder_that_cannot_be_written_warns_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    cache.store(KEY, b"payload")
    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    with pytest.warns(
        RuntimeWarning, match=r"cannot keep compiled kernels in .*\(Read-only file system\).*ELMAN_CACHE"
    ):
        cache.store("other", b"payload")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.store("other", b"payload")
    assert cache.load("other") is None
    assert cache.load(KEY) == b"payload"


def test_a_folder_whose_parent_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="ELMAN_CACHE"):
        cache.store(KEY, b"payload")
    assert cache.load(KEY) is None

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from elman.data.bytes import map_bytes
from elman.data.info import describe
from elman.data.pack import find_files, pack
from elman.data.stdlib import pack_stdlib, stdlib_files, stdlib_path
from elman.errors import UsageError


def documents(path: Path) -> list[bytes]:
    assert path.read_bytes().endswith(b"\x1e")
    return path.read_bytes().split(b"\x1e")[:-1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    (root / "sub" / ".git").mkdir(parents=True)
    (root / "a.py").write_bytes(b"print('a')\n")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "sub" / "b.txt.gz").write_bytes(gzip.compress(b"packed " * 1000))
    (root / "lines.jsonl").write_text('{"text": "o\\u001ene"}\n\n{"text": "zwei \\u00fc"}\n{"text": ""}\n')
    (root / "more.ndjson.gz").write_bytes(gzip.compress(b'{"text": "three", "id": 3}\n'))
    (root / "delimited").write_bytes(b"left\x1eright")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0")
    (root / "empty").write_bytes(b"")
    (root / ".hidden").write_bytes(b"secret")
    (root / "sub" / ".git" / "config").write_bytes(b"secret")
    return root


def test_everything_that_is_text_goes_in_once(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    summary = pack(find_files([tree, tree / "a.py"]), out)
    expected = {b"print('a')\n", b"caf\xe9", b"packed " * 1000, b"o ne", "zwei ü".encode(), b"three", b"left", b"right"}
    assert set(documents(out)) == expected
    assert summary.documents == len(documents(out)) == len(expected)
    assert summary.bytes == out.stat().st_size
    assert summary.replaced == 1
    assert summary.skipped == {"binary files": 1, "empty documents": 2}
    assert list(out.parent.iterdir()) == [out]


def test_the_order_is_fixed_and_independent_of_the_folder(tree: Path, tmp_path: Path) -> None:
    first, moved = tmp_path / "first", tmp_path / "elsewhere"
    pack(find_files([tree]), first)
    tree.rename(moved)
    second = tmp_path / "second"
    pack(find_files([moved]), second)
    assert first.read_bytes() == second.read_bytes()


def test_a_packed_file_keeps_its_documents(tree: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    first = pack(find_files([tree]), once)
    second = pack([once], twice)
    assert twice.read_bytes() == once.read_bytes()
    assert (second.documents, second.bytes) == (first.documents, first.bytes)


def test_long_documents_stream(tmp_path: Path) -> None:
    source = tmp_path / "long.txt"
    source.write_bytes(os.urandom(3 << 20).replace(b"\x1e", b"-").replace(b"\0", b"-"))
    pack([source], tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == source.read_bytes() + b"\x1e"


def test_an_existing_file_is_never_overwritten(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already and is left as it is"):
        pack(find_files([tree]), out)
    assert out.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "fine"}\n{"text": ', "line 2, is no JSON object"),
        ("bad.jsonl", b"[1, 2]\n", "line 1, is no JSON object"),
        ("bad.jsonl", b'{"body": "x"}\n', "line 1, has no field 'text'.*--field NAME"),
        ("bad.jsonl", b'{"text": 5}\n', "line 1, has no text in field 'text'"),
        ("bad.gz", gzip.compress(b"x" * 10000, mtime=0)[:-20], "bad.gz is broken"),
        ("bad.gz", b"not gzip at all", "bad.gz is broken"),
        ("bad.txt", b"\0\0", "nothing to pack: 1 binary files"),
    ],
)
def test_broken_input_leaves_nothing_behind(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(content)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=message):
        pack(find_files([folder]), out)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_bad_lines_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "mixed.jsonl"
    source.write_text('{"text": "good"}\n{"body": 1}\nnonsense\n')
    summary = pack([source], tmp_path / "out", skip_bad=True)
    assert documents(tmp_path / "out") == [b"good"]
    assert summary.skipped == {"bad lines of JSON": 2}


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such file or folder"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="has no files to pack"):
        find_files([tmp_path])


def test_info_counts_documents_and_bytes(tmp_path: Path) -> None:
    source = tmp_path / "text"
    lengths = [0, 3, 10, 4000]
    source.write_bytes(b"".join(b"a" * length + b"\x1e" for length in lengths) + b"tail")
    facts = describe(map_bytes(source, "FILE"))
    assert facts.size == source.stat().st_size
    assert facts.documents == 5
    assert facts.unterminated
    assert (facts.length_quantiles[0], facts.length_quantiles[3], facts.length_quantiles[-1]) == (0, 4, 4000)
    assert facts.histogram[ord("a")] == 4014
    assert facts.histogram.sum() == facts.size
    uniform = describe(np.arange(256, dtype=np.uint8))
    assert uniform.entropy == pytest.approx(8.0)


def test_the_standard_library_is_packed_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path))
    files = stdlib_files()
    assert sum(file.stat().st_size for file in files) > 5_000_000
    path = pack_stdlib(files[:20], lambda file: file.open("rb"))
    assert path == stdlib_path()
    assert len(documents(path)) == sum(file.stat().st_size > 0 for file in files[:20])
    assert list(path.parent.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set ELMAN_CACHE"):
        pack_stdlib(stdlib_files()[:1], lambda file: file.open("rb"))

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elman.data.bytes import MAX_HELDOUT, gather, heldout_starts, open_bytes
from elman.data.sampling import WindowSampler
from elman.errors import UsageError


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_the_tail_starts_after_a_delimiter_and_no_byte_is_in_both_parts(tmp_path: Path) -> None:
    documents = [bytes([65 + i % 26]) * (50 + i) for i in range(200)]
    text = b"\x1e".join(documents) + b"\x1e"
    data = open_bytes(write(tmp_path / "text", text))
    assert bytes(data.train) + bytes(data.heldout) == text
    assert data.train[-1] == 0x1E
    assert len(text) * 0.05 <= len(data.heldout) <= len(text) * 0.05 + 250


def test_a_file_without_delimiters_is_cut_where_the_fraction_falls(tmp_path: Path) -> None:
    data = open_bytes(write(tmp_path / "text", b"x" * 1000), 0.1)
    assert (len(data.train), len(data.heldout)) == (900, 100)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.6, float("nan")])
def test_a_fraction_out_of_range_is_named(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UsageError, match="--heldout"):
        open_bytes(write(tmp_path / "text", b"x" * 1000), fraction)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing: no such file.*elman data pack"):
        open_bytes(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"is a folder.*elman data pack"):
        open_bytes(tmp_path)
    with pytest.raises(UsageError, match="is empty"):
        open_bytes(write(tmp_path / "empty", b""))
    with pytest.raises(UsageError, match=r"is compressed.*elman data pack"):
        open_bytes(write(tmp_path / "text.gz", b"\x1f\x8b\x08\x00abc"))
    with pytest.raises(UsageError, match=r"--seq-len 512 needs windows of 513 bytes.*has 95"):
        WindowSampler(open_bytes(write(tmp_path / "short", b"x" * 100)).train, 512, 1, 0)
    with pytest.raises(UsageError, match=r"the held-out part has 5.*--heldout"):
        heldout_starts(open_bytes(tmp_path / "short").heldout, 64, 1000)


def test_heldout_windows_cover_the_part_once_each() -> None:
    data = np.arange(101, dtype=np.uint8)
    starts = heldout_starts(data, 10, 10**9)
    assert starts.tolist() == list(range(0, 100, 10))
    assert np.array_equal(gather(data, starts, 10)[:, 1:].ravel(), data[1:])
    thinned = heldout_starts(data, 10, 40)
    assert thinned.tolist() == [0, 30, 60, 90]
    assert heldout_starts(data, 10, 1).tolist() == [0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_file_of_100_gb_costs_a_few_mb(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(100 * 10**9)
        file.seek(100 * 10**9 - MAX_HELDOUT - 1000)
        file.write(b"\x1e")
    code = f"""
from pathlib import Path
from elman.data.bytes import heldout_starts, gather, open_bytes
from elman.data.sampling import WindowSampler
def private():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
before = private()
data = open_bytes(Path({str(path)!r}))
assert len(data.heldout) == {MAX_HELDOUT} + 999, len(data.heldout)
windows = WindowSampler(data.train, 512, 32, 0)
for step in range(300):
    windows.batch(step)
gather(data.heldout, heldout_starts(data.heldout, 512, 10**6), 512)
print(private() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 10 * 2**20

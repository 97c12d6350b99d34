"""The benchmark of writing, at toy sizes: its rows, its table, and what it does where memory ends."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import decode
from benchmarks.decode import CASES, Options, Row
from elman.errors import UsageError
from elman.generation import Decoder
from elman.mixers.transformer import KeyValueCache
from elman.sizing import state_size

TINY = {"batch_sizes": (1, 3), "params": 200_000, "steps": 2, "device": "cpu"}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(decode, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_every_case_can_be_sized() -> None:
    for case in CASES:
        assert case.size(50_000_000).depth == (case.depth or 6)
    with pytest.raises(UsageError, match="--models e99 is not among"):
        decode.choose(["e99"])


def test_a_run_measures_and_writes(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[int] = []
    step = Decoder.step

    def watch(decoder: Decoder) -> torch.Tensor:
        caches.extend(state.keys.shape[2] for state in decoder._state if isinstance(state, KeyValueCache))
        return step(decoder)

    monkeypatch.setattr(Decoder, "step", watch)
    # Memory for 96 tokens in all, not for 144.
    transformer = next(case for case in CASES if case.pattern == "transformer").size(200_000)
    monkeypatch.setattr(decode, "total_memory", lambda device: 140 * 4 * state_size(transformer, 1))
    options = Options(models=("e1", "transformer"), contexts=(32, 48), out=tmp_path / "out", **TINY)
    rows = decode.main(options)
    assert [(row.model, row.batch_size, row.context) for row in rows] == [
        ("e1", 1, None), ("e1", 3, None), *(("transformer --depth 10", b, c) for c in (32, 48) for b in (1, 3)),
    ]  # fmt: skip
    for row in rows[:-1]:
        assert row.note == ""
        assert row.tokens_per_second == pytest.approx(row.batch_size / row.ms_per_step * 1e3)
        assert row.params == pytest.approx(200_000, rel=0.02)
    assert "more than the device holds" in rows[-1].note
    assert rows[0].backends == {"reference": 6}
    assert rows[1].state_gib == pytest.approx(3 * rows[1].state * 4 / 2**30)
    assert set(caches) == {32, 48}
    (written,) = results.iterdir()
    assert written.read_text() == (tmp_path / "out" / written.name).read_text()
    assert [Row(**row) for row in json.loads(written.read_text())["rows"]] == rows


def test_the_table_tells_what_was_not_measured() -> None:
    rows = [
        Row("e1", 1, None, 8, 2, 5, 3, captured=True, ms_per_step=0.1, tokens_per_second=1e4, peak_gib=1.0),
        Row("e1", 64, note="out of memory"),
        Row("transformer", 1, 1024, ms_per_step=1, tokens_per_second=1e3, peak_gib=2.0),
    ]
    lines = decode.table(rows).splitlines()
    assert lines[2] == "| e1 | 8 × 2 | 5 | 3 | 10,000 | 100 | 1.00 | out of memory |  |  |"
    assert lines[3].startswith("| transformer, 1,024 tokens | - | - | - | 1,000 (plain) | 1,000 | 2.00 | - |")

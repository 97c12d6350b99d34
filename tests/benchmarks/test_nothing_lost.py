"""The benchmark of disturbed runs: one disturbance at a toy size, and what counts as lost."""

import signal
from pathlib import Path

from benchmarks.nothing_lost import Options, Row, Trials, interrupt, is_bad, losses, markdown, undisturbed


def test_a_run_is_killed_while_it_saves_and_goes_on(tmp_path: Path) -> None:
    trials = Trials(tmp_path, Options(steps=40))
    trials.data.write_bytes(b"abcdefg \n" * 3000)
    undisturbed(trials)
    row = interrupt(trials, signal.SIGKILL, "saving", 10)
    assert row.code == -signal.SIGKILL
    assert row.same
    assert not is_bad(row)
    assert losses(tmp_path / "run-2") == trials.losses
    assert f"| kill -9 | {row.when} | -9 |" in markdown([row])


def test_what_is_lost_is_seen() -> None:
    assert is_bad(Row("kill -9", "3", -9, same=False))
    assert is_bad(Row("SIGTERM", "3", 130, 21.0, 3, same=True))
    assert is_bad(Row("SIGTERM", "3", 130, 1.0, None, same=True))
    assert not is_bad(Row("SIGTERM", "3", 130, 1.0, 3, same=True))
    assert not is_bad(Row("SIGINT", "start-up", 130, 1.0))

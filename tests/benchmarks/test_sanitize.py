"""Repeating launches and counting what a tool says, by stand-ins for the GPU and the tool."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.sanitize import __main__ as driver_mode
from benchmarks.sanitize import launches as files
from benchmarks.sanitize import replay
from benchmarks.sanitize.launches import Buffer, Launch, Place


class Memory:
    """A GPU in a dictionary, with one kernel: it adds its last argument to every byte of a buffer."""

    def __init__(self, wrong: bool = False, broken: bool = False) -> None:
        self.there: dict[int, np.ndarray] = {}
        self.top, self.wrong, self.broken, self.runs = 1000, wrong, broken, 0

    def allocate(self, size: int) -> int:
        if self.broken and self.runs:
            raise replay.GpuError("CUDA_ERROR_LAUNCH_FAILED")
        self.top += 1000
        self.there[self.top] = np.full(size, 77, np.uint8)
        return self.top

    def free(self, address: int) -> None:
        del self.there[address]

    def write(self, address: int, data: np.ndarray) -> None:
        self.there[address][:] = data

    def read(self, address: int, size: int) -> np.ndarray:
        return self.there[address][:size].copy()

    def run(self, launch: Launch, arguments: Sequence[np.int64 | np.float64]) -> None:
        self.runs += 1
        if self.broken:
            raise replay.GpuError("CUDA_ERROR_LAUNCH_FAILED")
        source, target, zero, number = arguments
        assert (type(zero), type(number)) == (np.int64, np.float64)
        assert len(self.there[int(source) - 1]) == 3
        self.there[int(target)][:] = self.there[int(source) - 1] + int(number) + self.wrong


def adding(words: str = "words") -> Launch:
    before = np.array([1, 2, 3], np.uint8)
    buffers = (Buffer(before, before), Buffer(np.full(3, 255, np.uint8), before + 5, True), Buffer(before, None))
    arguments = (Place(0, 1), Place(1, 0), 0, 5.0)
    return Launch("norm", words, b"", "add", (1, 1, 1), 32, 0, None, False, arguments, buffers)


def test_a_launch_is_repeated_as_it_was(tmp_path: Path) -> None:
    files.save([adding()], tmp_path)
    (launch,) = files.load(tmp_path)
    gpu = Memory()
    assert replay.repeat(launch, gpu) == []
    assert not gpu.there
    assert replay.repeat(launch, Memory(wrong=True)) == [1]
    assert replay.repeat(launch, Memory(wrong=True), bare=True) == []


def test_a_replay_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    launches = [adding("a"), adding("b"), adding("c")]
    assert replay.repeat_all(launches, Memory(), 1, 100) == 0
    assert capsys.readouterr().out.splitlines()[::2] == ["start 1", "start 2"]
    assert replay.repeat_all(launches, Memory(wrong=True), 0, 100) == 1
    assert "done 2 | differs in 1 |" in capsys.readouterr().out
    assert replay.repeat_all(launches, Memory(broken=True), 0, 100) == replay.CONTEXT_LOST
    out = capsys.readouterr().out
    assert "done 0 | failed with CUDA_ERROR_LAUNCH_FAILED |" in out
    assert "start 1" not in out
    assert replay.repeat_all(launches, Memory(), 0, 0) == 0
    assert capsys.readouterr().out == ""


MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at void diagonal_forward<Tanh, bf16, 2>(const T2 *, long)+0x6c0 in diagonal.cuh:81
=========     by thread (3,0,0) in block (0,0,0)
=========     Access to 0x7f4c2c200200 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========
========= Invalid __global__ write of size 2 bytes
=========     at void diagonal_forward<Tanh, bf16, 2>(const T2 *, long)+0x6c0 in diagonal.cuh:81
=========     by thread (4,0,0) in block (0,0,0)
=========     Access to 0x7f4c2c200204 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void persistent_forward<bf16, Tanh, (int)1, (int)1, (int)0, (int)1, persistent::StagedRing2>(const T1 *, int)+0x1c70 in primitives.cuh:35
=========     and Read access at void persistent_forward<bf16, Tanh, (int)1, (int)1, (int)0, (int)1, persistent::StagedRing2>(const T1 *, int)+0x2a0 in exchange.cuh:99 [12 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""  # noqa: E501


def test_errors_count_for_the_family_of_their_kernel() -> None:
    report = driver_mode.Report({})
    driver_mode._count_errors(MEMCHECK + RACECHECK, report)
    assert {family: result.errors for family, result in report.families.items()} == {
        "diagonal": 2,
        "persistent StagedRing2": 1,
    }
    assert report.told == 3
    assert [message.splitlines()[0] for message in report.messages] == [
        "diagonal: Invalid __global__ write of size # bytes: 2 in diagonal",
        "Write at primitives.cuh:35, Read at exchange.cuh:99: 1 in persistent StagedRing2",
    ]
    assert "Access to 0x7f4c2c200200 is out of bounds" in report.messages[0]
    assert not report.clean


@pytest.mark.parametrize(
    ("function", "family"),
    [
        ("void split_forward<bf16, Tanh, (int)1, (int)0, (int)2, (int)2, (int)4>(const T1 *, int)", "split"),
        ("void wide::run_loader<split::Shape<Tanh, (bool)0, (int)1, (int)0, (int)2, (int)2, (int)4>>()", "split"),
        ("void wide::run_loader<wide::Shape<Tanh, (bool)0, (int)1, (int)0, (int)2, (int)1, (int)1>>()", "wide"),
        ("void wide_backward<bf16, Tanh, (int)1, (int)0, (int)2, (int)1, (int)1>(const T1 *, int)", "wide"),
        ("void other()", driver_mode._OTHER),
    ],
)
def test_an_inlined_function_is_of_the_family_that_it_is_for(function: str, family: str) -> None:
    report = driver_mode.Report({})
    driver_mode._count_errors(
        f"========= Barrier error detected. Invalid arguments\n=========     at {function}+0x6c0 in hopper.cuh:81\n",
        report,
    )
    assert {family: result.errors for family, result in report.families.items()} == {family: 1}


def access(kind: str, function: str, exchange: str, line: int, start: str = "    and") -> str:
    file = {"run_cells": "cells", "Product": "products"}.get(function, "step")
    shape = "persistent::Shape<Lstm, (bool)0, (int)10, (int)1, (int)0, (int)1>"
    return (
        f"========= {start} {kind} access at void persistent::{function}<{shape}, bf16, persistent::{exchange}>"
        f"(const persistent::Problem<T3, T4> &, char *, int)+0x2fc0 in persistent_{file}.cuh:{line} [64 hazards]\n"
    )


def control_race(kind: str) -> str:
    function = f"void control<control_{kind}, (int)2, (int)2>(float *, long long)"
    return (
        f"========= Error: Race reported between Read access at {function}+0x1c0 in control.cuh:38\n"
        f"=========     and Write access at {function}+0x150 in control.cuh:29 [160 hazards]\n========= \n"
    )


def racecheck(*controls: str) -> driver_mode.Report:
    """On three handovers, and one race that is none."""
    reading, *_, writing = driver_mode._HANDOVER
    read, write = (driver_mode._lines_between(*side[2:])[2] for side in (reading, writing))
    start = "Error: Race reported between"
    messages = [
        access("Read", "run_cells", exchange, read, start)
        + access("Write", "Product", exchange, write)
        + access("Write", "Product", exchange, write + 1)
        for exchange in (
            "ClusterPush<bf16, (int)1, (int)1>",
            *(f"StagedRing<bf16, (int)1, (int)1, (int){n}>" for n in (2, 3)),
        )
    ]
    other = access("Write", "Product", "PolledRing<bf16, (int)1, (int)1>", write)
    messages.append(access("Read", "run_cells", "PolledRing<bf16, (int)1, (int)1>", read + 100, start) + other)
    messages += map(control_race, controls)
    number = len(messages)
    summary = f"========= RACECHECK SUMMARY: {number} hazards displayed ({number} errors, 0 warnings)\n"
    report = driver_mode.Report({}, reached=1)
    driver_mode._count_errors("========= \n".join([*messages, summary]), report)
    assert report.told == report.counted == number
    return report


HANDING = ("persistent ClusterPush", "persistent StagedRing2", "persistent StagedRing3")


def test_handovers_count_apart_where_the_control_is_reported() -> None:
    report = racecheck("racing", "handed_over")
    of = report.families
    assert [(of[family].errors, of[family].handovers) for family in HANDING] == [(0, 1)] * 3
    assert [of[family].errors for family in ("persistent PolledRing", *driver_mode.CONTROLS)] == [1, 1, 1]
    assert any("does not follow barrier.cta.arrive" in message for message in report.messages)
    assert sum("like the control's: 1 in persistent ClusterPush, 1 in" in message for message in report.messages) == 2
    assert not driver_mode.judge("racecheck", report)
    del of["persistent PolledRing"]
    report.told -= 1
    assert driver_mode.judge("racecheck", report)


def test_handovers_are_errors_where_the_tool_follows_the_control() -> None:
    report = racecheck("racing")
    assert [(report.families[family].errors, report.families[family].handovers) for family in HANDING] == [(1, 0)] * 3
    assert not any("barrier.cta.arrive" in message for message in report.messages)
    assert not driver_mode.judge("racecheck", report)


def test_a_handover_is_of_its_two_sides_alone() -> None:
    (_, _, cells, *reads), (_, _, ranks, *others), (_, _, products, *writes) = driver_mode._HANDOVER
    read = driver_mode._Access("Read", "void persistent::run_cells<X>(int)", cells, 0)
    write = driver_mode._Access("Write", "void persistent::Product<X>::run<Y>(int)", products, 0)
    read = read._replace(line=driver_mode._lines_between(cells, *reads)[0])
    write = write._replace(line=driver_mode._lines_between(products, *writes)[0])
    of_ranks = driver_mode._Access(
        "Read", "void low_rank::run_ranks<X>(int)", ranks, driver_mode._lines_between(ranks, *others)[0]
    )
    assert driver_mode._is_handover([read, write, write])
    assert driver_mode._is_handover([of_ranks, write])
    assert driver_mode._is_handover([write, read])
    wrong = [
        read._replace(kind="Write"),
        read._replace(line=1),
        write._replace(function="void persistent::run_cells<X>()"),
    ]
    for accesses in ([], [write], [read], *([read, write, one] for one in wrong)):
        assert not driver_mode._is_handover(accesses)


def test_racecheck_has_to_report_the_race() -> None:
    def judged(tool: str, errors: int) -> bool:
        families = {name: driver_mode.Result(errors=errors) for name in driver_mode.CONTROLS}
        return driver_mode.judge(tool, driver_mode.Report(families, told=2 * errors, reached=1))

    assert judged("racecheck", 1)
    assert not judged("racecheck", 0)
    assert judged("memcheck", 1)
    assert judged("memcheck", 0)


def test_what_a_tool_did_not_print_is_not_clean() -> None:
    report = driver_mode.Report({})
    driver_mode._count_errors("========= RACECHECK SUMMARY: 200 hazards displayed (817 errors, 1 warning)\n", report)
    assert (report.told, report.counted, report.clean) == (818, 0, False)


def test_a_remark_is_told_and_the_replays_own_exit_code_is_no_error() -> None:
    text = """\
========= COMPUTE-SANITIZER
========= Warning: Detected overflow of tracked cuda::barrier structures. Results might be incorrect.
=========
========= Target application returned an error
========= ERROR SUMMARY: 1 error
"""
    report = driver_mode.Report({})
    driver_mode._count_errors(2 * text, report)
    assert report.told == 0
    assert [message[:33] for message in report.messages] == ["2 × Warning: Detected overflow of"]


def test_no_errors_are_none() -> None:
    report = driver_mode.Report({"norm": driver_mode.Result()})
    driver_mode._count_errors("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", report)
    assert (report.told, report.messages, report.clean) == (0, [], True)


STAND_IN = """
import sys, time
first = int(sys.argv[sys.argv.index("--first") + 1])
open({log!r}, "w").write("========= Barrier error\\n=========     at norm_forward<bf16, 2>\\n=========\\n"
                         "========= ERROR SUMMARY: 1 error\\n" if first == 2 else "")
for number in range(first, 4):
    print("start", number, flush=True)
    if number == {dies_at}:
        sys.exit(4)
    if number == {hangs_at}:
        time.sleep(100)
    print(f"done {{number}} | {{'differs in 1' if number == 3 else 'ok'}} | 0.5 | words {{number}}", flush=True)
"""


@pytest.mark.parametrize(("dies_at", "hangs_at"), [(9, 9), (1, 9), (9, 1)])
def test_what_a_case_breaks_the_others_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int, hangs_at: int
) -> None:
    monkeypatch.setattr(driver_mode, "_LAUNCH_SECONDS", 2.0)

    def command(log: Path, without: Collection[str]) -> list[str]:
        return [sys.executable, "-c", STAND_IN.format(log=str(log), dies_at=dies_at, hangs_at=hangs_at)]

    report = driver_mode.run_tool(command, tmp_path, "memcheck", ["norm", "banks", "norm", "banks"], 60)
    of_norm, of_banks = report.families["norm"], report.families["banks"]
    broken = min(dies_at, hangs_at) == 1
    assert report.reached == 4
    assert [of_norm.cases, of_banks.cases, of_norm.seconds] == [2, 2 - broken, 1.0]
    assert of_banks.wrong == ["launch 1 ended its process"] * (dies_at == 1) + ["words 3: differs in 1"]
    assert of_banks.cut_off == ["launch 1 took longer than 2 s"] * (hangs_at == 1)
    assert of_norm.errors == report.told == broken
    assert not report.clean


def test_time_that_is_up_ends_it(tmp_path: Path) -> None:
    report = driver_mode.run_tool(lambda log, without: ["false"], tmp_path, "memcheck", ["norm"], 0)
    assert (report.reached, report.families["norm"].cases, report.last_words) == (0, 0, "")


def test_a_tool_that_does_not_run_says_why(tmp_path: Path) -> None:
    report = driver_mode.run_tool(
        lambda log, without: [sys.executable, "-c", "print('no')"], tmp_path, "racecheck", ["norm"], 60
    )
    assert (report.reached, report.last_words) == (0, "no\n")


def test_a_tool_runs_without_the_options_that_it_does_not_take(tmp_path: Path) -> None:
    def command(log: Path, without: Collection[str]) -> list[str]:
        left = [word for word in driver_mode._command("tool", "synccheck", log, without) if word.startswith("--num")]
        return [sys.executable, "-c", OLD_TOOL, *left]

    report = driver_mode.run_tool(command, tmp_path, "synccheck", ["norm"], 60)
    assert (report.reached, report.families["norm"].cases, report.last_words) == (1, 1, "")
    assert report.messages == ["this version does not take --num-cuda-barriers, and ran without"]
    fixed = driver_mode.run_tool(lambda log, without: command(log, []), tmp_path, "synccheck", ["norm"], 60)
    assert fixed.reached == 0
    assert fixed.last_words == "unrecognised option '--num-cuda-barriers'\n"


OLD_TOOL = """
import sys
if "--num-cuda-barriers" in sys.argv:
    sys.exit("unrecognised option '--num-cuda-barriers'")
print("start 0\\ndone 0 | ok | 0.5 | words")
"""

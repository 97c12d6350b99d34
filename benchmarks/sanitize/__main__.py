"""Are the kernels clean under compute-sanitizer? Prints one table, tool × family of kernels. Needs a GPU.

PyTorch is not run under the tools, which make its import take longer than all else. First ``record.py`` runs small
problems and records every launch; then ``replay.py``, which imports no PyTorch, repeats the launches under each tool,
once without any, on buffers of exactly their sizes, and compares what comes out bit for bit. Cases come in turns, one
of each family after another, until the tool's time is up: the table says how far it came.

An error of a tool, or a warning, counts for the family whose kernel its message names. The exit code is 1 if there was
one, a difference or a launch that failed; that a launch took too long under a tool is only told. Run it from the
repository's root: ``python -m benchmarks.sanitize``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.sanitize.launches import load, save

TOOLS = ("none", "memcheck", "racecheck", "synccheck", "initcheck")
#: Of the name of a kernel, and its family.
_FAMILIES = {
    **{name: f"persistent {name}" for name in ("PolledRing", "StagedRing2", "StagedRing3", "ClusterPush")},
    **{
        f"{name}_{way}": name
        for name in ("wide", "diagonal", "step", "banks", "norm")
        for way in ("forward", "backward")
    },
}
_OTHER = "no family"
#: How long a launch may take, or what a tool has to say before the first and after the last one.
_LAUNCH_SECONDS = 20.0
_SHOWN_LINES = 14


@dataclass
class Result:
    """What a tool said of a family. A launch may take too long for it: some tools make waiting very slow."""

    cases: int = 0
    wrong: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)
    errors: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """What a tool said.

    Attributes:
        families: each in its row.
        told: the tool's own count of errors.
        messages: the first of each kind.
        reached: launches, in their order.
        last_words: of a process that has launched nothing.
    """

    families: dict[str, Result]
    told: int = 0
    messages: list[str] = field(default_factory=list)
    reached: int = 0
    last_words: str = ""

    @property
    def clean(self) -> bool:
        return not self.told and not any(result.wrong or result.errors for result in self.families.values())


def run_tool(
    command: Callable[[Path], Sequence[str]],
    folder: Path,
    name: str,
    families: Sequence[str],
    seconds: float,
    bare: bool = False,
) -> Report:
    """Replays the launches, whose families are given, in new processes where a context is lost.

    ``command``, of the file for the tool's words, is what replays; what is printed goes to files in the folder that
    begin with ``name``.
    """
    end = time.monotonic() + seconds
    report = Report({family: Result() for family in dict.fromkeys(families)})
    words = []
    for number in itertools.count():
        left = end - time.monotonic()
        if report.reached >= len(families) or left <= 0:
            break
        log, output = (folder / f"{name}-{number}.{kind}" for kind in ("log", "out"))
        log.unlink(missing_ok=True)
        options = [str(folder), "--first", str(report.reached), "--seconds", f"{left:.1f}", *["--bare"] * bare]
        with output.open("w") as file:
            code = _run([*command(log), *options], file.fileno(), _LAUNCH_SECONDS, since_last_word=True)
        words.append(log.read_text(errors="replace") if log.exists() else "")
        started = _count_cases(output.read_text(errors="replace"), families, report, cut_off=code is None)
        if not started:  # a tool that does not work here
            report.last_words = f"{output.read_text(errors='replace')[-1500:]}{words[-1][-1500:]}"
            break
        report.reached = started[-1] + 1
    _count_errors("".join(words), report)
    return report


def _count_cases(text: str, families: Sequence[str], report: Report, cut_off: bool) -> list[int]:
    """Enters what a process has printed; the launches that it has started."""
    started = [int(number) for number in re.findall(r"^start (\d+)$", text, re.MULTILINE)]
    finished = set()
    for number, outcome, took, words in re.findall(r"^done (\d+) \| (.*) \| (.*) \| (.*)$", text, re.MULTILINE):
        finished.add(int(number))
        result = report.families[families[int(number)]]
        result.cases, result.seconds = result.cases + 1, result.seconds + float(took)
        if outcome != "ok":
            result.wrong.append(f"{words}: {outcome}")
    for number in started:
        if number not in finished:
            result = report.families[families[number]]
            if cut_off:
                result.cut_off.append(f"launch {number} took longer than {_LAUNCH_SECONDS:g} s")
            else:
                result.wrong.append(f"launch {number} ended its process")
    return started


def _run(command: Sequence[str], output: int, seconds: float, since_last_word: bool = False) -> int | None:
    """The exit code; None if it was stopped, with all its children, since it took longer or printed nothing so long."""
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    end, printed = time.monotonic() + seconds, 0
    while (code := process.poll()) is None and time.monotonic() < end:
        if since_last_word and (size := os.fstat(output).st_size) > printed:
            end, printed = time.monotonic() + seconds, size
        time.sleep(0.05)
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code


def _count_errors(text: str, report: Report) -> None:
    """A message is a line that begins flush behind the tool's mark, and the indented ones after it."""
    tellings = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    # Of races: every hazard, warnings too.
    tellings += re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)
    report.told = sum(map(int, tellings))
    kinds: Counter[tuple[str, str]] = Counter()
    for message in re.findall(r"^========= \S.*(?:\n=========(?:  .*)?$)*", text, re.MULTILINE):
        head, *rest = message.splitlines()
        if "SUMMARY" in head or not any(" at " in line or "Access" in line for line in (head, *rest)):
            continue
        # A message of the driver's own, such as a launch that was refused, names no kernel.
        family = next((family for name, family in _FAMILIES.items() if name in message), _OTHER)
        report.families.setdefault(family, Result()).errors += 1
        kind = family, re.sub(r"0x[0-9a-f]+|\d+", "#", head)
        kinds[kind] += 1
        if kinds[kind] == 1:
            report.messages.append("\n".join([f"{family}:", head, *rest][:_SHOWN_LINES]))


def row(tool: str, family: str, result: Result, there: int) -> str:
    """A line of the table."""
    counts = f"{result.cases} of {there}", len(result.cut_off), len(result.wrong), result.errors
    return f"| {' | '.join(map(str, (tool, family, *counts, f'{result.seconds:.1f}')))} |"


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.sanitize", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="in this order")
    parser.add_argument("--seconds", type=float, default=45, help="for each tool")
    parser.add_argument("--record-seconds", type=float, default=180, help="for the recording")
    parser.add_argument("--folder", type=Path, default=Path("runs/sanitize"), help="for recorded launches and logs")
    parser.add_argument("--keep", action="store_true", help="take the launches that are in the folder already")
    args = parser.parse_args()
    program = shutil.which("compute-sanitizer")
    if program is None and set(args.tools) != {"none"}:
        parser.error("compute-sanitizer is not on the PATH")
    messages = []
    if not args.keep:
        args.folder.mkdir(parents=True, exist_ok=True)
        save([], args.folder)  # so that none are left of another recording
        command = [sys.executable, "-m", "benchmarks.sanitize.record", str(args.folder)]
        code = _run(command, sys.stdout.fileno(), args.record_seconds)
        if code != 0:
            why = f"failed with exit code {code}" if code is not None else "took too long: see --record-seconds"
            messages.append(f"the recording {why}")
    launches = load(args.folder)
    families = [launch.family for launch in launches]
    there = Counter(families)

    clean = bool(launches) and not messages
    print("\n| tool | family | cases | cut off | wrong | errors | seconds |\n|---|---|---|---|---|---|---|")
    for tool in args.tools:
        report = run_tool(
            functools.partial(_command, program if tool != "none" else None, tool),
            args.folder,
            tool,
            families,
            args.seconds,
            bare=tool == "initcheck",
        )
        for family, result in report.families.items():
            print(row(tool, family, result, there[family]), flush=True)
            messages += [f"{tool}: {family}, {words}" for words in result.cut_off]
            messages += [f"{tool}: {words}" for words in result.wrong]
        counted = sum(result.errors for result in report.families.values())
        if report.told != counted:
            messages.append(f"{tool} itself tells of {report.told} errors; {counted} messages are counted above")
        if not report.reached:
            messages.append(f"{tool} ran nothing: {report.last_words}")
        messages += [f"{tool}, {message}" for message in report.messages]
        clean &= report.clean and report.reached > 0
        clean &= tool != "none" or not any(result.cut_off for result in report.families.values())
    print("\n" + "\n\n".join([*messages, "clean" if clean else "NOT CLEAN"]))
    return int(not clean)


def _command(program: str | None, tool: str, log: Path) -> list[str]:
    """What replays launches, under a tool if there is a program; without the arguments of ``replay.py``."""
    replay = [sys.executable, "-m", "benchmarks.sanitize.replay"]
    if program is None:
        return replay
    options = ["--tool", tool, "--log-file", str(log), "--launch-timeout", "60", "--print-limit", "200"]
    if tool == "memcheck":
        # Padded, so that no allocation begins where another ends. Calls that the driver refuses are told by the replay.
        options += ["--padding", "512", "--report-api-errors", "no", "--destroy-on-device-error", "kernel"]
    return [program, *options, *replay]


if __name__ == "__main__":
    sys.exit(main())

"""Are the kernels clean under compute-sanitizer? Prints one table, tool × family of kernels. Needs a GPU.

PyTorch is not run under the tools, which make its import take longer than all else. First ``record.py`` runs small
problems and records every launch; then ``replay.py``, which imports no PyTorch, repeats the launches under each tool,
once without any, on buffers of exactly their sizes, and compares what comes out bit for bit. Cases come in turns, one
of each family after another, until the tool's time is up: the table says how far it came.

An error of a tool, or a warning, counts for the family whose kernel its message names. The exit code is 1 if there was
one, a difference or a launch that failed; that a launch took too long under a tool is only told.

Two families are controls (``control.cuh``), which show what racecheck can tell and otherwise count for nothing. It has
to report the one with a race. If it reports the other one too, it does not follow barrier.cta.arrive; then its reports
of the same handover between the persistent kernels' warps, and no others, are counted apart. Run it from the
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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from benchmarks.sanitize.launches import load, save

#: Families whose kernels are NAME_forward and NAME_backward.
_NAMED_BY_WAY = (
    "split", "wide", "diagonal", "step", "banks", "norm", "scan", "gated_softmax", "short_conv", "matrix",
)  # fmt: skip
TOOLS = ("none", "memcheck", "racecheck", "synccheck", "initcheck")
_HANDED_OVER, _RACING = CONTROLS = "control, handed over", "control, racing"
#: Of the name of a kernel, and its family.
_FAMILIES = {
    **{f"control_{name[9:].replace(' ', '_')}": name for name in CONTROLS},
    "low_rank": "low_rank",  # whose messages may name an exchange, too
    **{name: f"persistent {name}" for name in ("PolledRing", "StagedRing2", "StagedRing3", "ClusterPush")},
    # A message may name an inlined function instead; those that the split kernels share with the wide ones name both.
    **{f"{name}::": name for name in ("split", "wide")},
    **{f"{name}_{way}": name for name in _NAMED_BY_WAY for way in ("forward", "backward")},
}
_OTHER = "no family"
#: How long a launch may take, or what a tool has to say before the first and after the last one.
_LAUNCH_SECONDS = 20.0
#: Errors that a tool prints in all; others it counts.
_PRINT_LIMIT = 10000
#: Options that not every version of a tool may take.
_OPTIONS = {
    # Padded, so that no allocation begins where another ends. Calls that the driver refuses are told by the replay.
    "memcheck": {"--padding": "512", "--report-api-errors": "no", "--destroy-on-device-error": "kernel"},
    # An mbarrier of a peer, by mapa, may look like one that nobody has initialised.
    "synccheck": {"--num-cuda-barriers": "256", "--missing-barrier-init-is-fatal": "no"},
}
#: Where the persistent kernels hand sums over: the kind of access, the function, its file, and the barriers around it.
_HANDOVER = (
    (
        "Read",
        "persistent::run_cells",
        "persistent_cells.cuh",
        "barrier_sync(kSumsFull + buffer",
        "barrier_arrive(kSumsEmpty + buffer",
    ),
    (
        *("Read", "low_rank::run_ranks", "low_rank.cuh"),
        *("kSumsFull + kRankBarriers + buffer", "kSumsEmpty + kRankBarriers + buffer"),
    ),
    (
        *("Write", "persistent::Product", "persistent_products.cuh"),
        *("barrier_sync(kSumsEmpty + kBarriers + buffer", "barrier_arrive(kSumsFull + kBarriers + buffer"),
    ),
)
_SHOWN_LINES, _SHOWN_KINDS, _SHOWN_COLUMNS = 4, 12, 300


@dataclass
class Result:
    """What a tool said of a family. A launch may take too long for it: some tools make waiting very slow.

    ``handovers`` are reports of what it reports of the control without a race too, and no errors.
    """

    cases: int = 0
    wrong: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)
    errors: int = 0
    handovers: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """What a tool said.

    Attributes:
        families: each in its row.
        told: the tool's own count of errors.
        messages: one for each kind, and what else there is to tell.
        reached: launches, in their order.
        last_words: of a process that has launched nothing.
    """

    families: dict[str, Result]
    told: int = 0
    messages: list[str] = field(default_factory=list)
    reached: int = 0
    last_words: str = ""

    @property
    def counted(self) -> int:
        """Errors, of the tool's own count, that are in the table."""
        return sum(result.errors + result.handovers for result in self.families.values())

    @property
    def clean(self) -> bool:
        """But for the controls."""
        wrong = any(of.wrong or of.errors for family, of in self.families.items() if family not in CONTROLS)
        return not wrong and self.told <= self.counted


def run_tool(
    command: Callable[[Path, Collection[str]], Sequence[str]],
    folder: Path,
    name: str,
    families: Sequence[str],
    seconds: float,
    bare: bool = False,
) -> Report:
    """Replays the launches, whose families are given, in new processes where a context is lost.

    ``command``, of the file for the tool's words and of the options that it does not take, is what replays; what is
    printed goes to files in the folder that begin with ``name``.
    """
    end = time.monotonic() + seconds
    report = Report({family: Result() for family in dict.fromkeys(families)})
    words = []
    without: list[str] = []
    for number in itertools.count():
        left = end - time.monotonic()
        if report.reached >= len(families) or left <= 0:
            break
        log, output = (folder / f"{name}-{number}.{kind}" for kind in ("log", "out"))
        log.unlink(missing_ok=True)
        options = [str(folder), "--first", str(report.reached), "--seconds", f"{left:.1f}", *["--bare"] * bare]
        with output.open("w") as file:
            code = _run([*command(log, without), *options], file.fileno(), _LAUNCH_SECONDS, since_last_word=True)
        words.append(log.read_text(errors="replace") if log.exists() else "")
        started = _count_cases(output.read_text(errors="replace"), families, report, cut_off=code is None)
        if not started:  # a tool that does not work here, or not with these options
            said = output.read_text(errors="replace"), words[-1]
            rejected = re.search(r"option '(--[\w-]+)'", "".join(said))
            if rejected is None or rejected[1] in without:
                report.last_words = f"{said[0][-1500:]}{said[1][-1500:]}"
                break
            without.append(rejected[1])
            report.messages.append(f"this version does not take {rejected[1]}, and ran without")
            continue
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


class _Access(NamedTuple):
    """One of a race. ``function`` is as the tool demangles it, ``file`` empty where the tool does not know it."""

    kind: str
    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.kind} at {f'{self.file}:{self.line}' if self.file else self.function[:_SHOWN_COLUMNS]}"


def _accesses(message: str) -> list[_Access]:
    found = re.findall(
        r"(\w+) access at (.*?)(?:\+0x[0-9a-f]+)?(?: in (\S+):(\d+))?(?: \[\d+ hazards?\])?$", message, re.M
    )
    return [_Access(kind, function, file, int(line or 0)) for kind, function, file, line in found]


@functools.cache
def _lines_between(file: str, first: str, last: str) -> range:
    """Of a kernel's source, between two lines that hold these."""
    lines = resources.files("elman.ops.cuda").joinpath(file).read_text().splitlines()
    start, stop = ([number for number, line in enumerate(lines, 1) if mark in line] for mark in (first, last))
    if not (len(start) == len(stop) == 1):
        raise ValueError(f"{file} does not have {first} and {last} once")
    return range(start[0] + 1, stop[0])


def _is_handover(accesses: Sequence[_Access]) -> bool:
    """Whether both sides of the persistent kernels' handover of sums are there, and nothing else."""
    found: dict[str, set[_Access]] = {kind: set() for kind, *_ in _HANDOVER}
    for kind, function, file, *marks in _HANDOVER:
        found[kind] |= {
            access
            for access in accesses
            if (access.kind, access.file) == (kind, file)
            and re.match(rf"(void )?{function}<", access.function)
            and access.line in _lines_between(file, *marks)
        }
    return all(found.values()) and set().union(*found.values()) == set(accesses)


def _family_of(message: str) -> str:
    """A message of the driver's own, such as a launch that was refused, names no kernel."""
    message = re.sub(r"StagedRing<[^<>]*\b(\d)>", r"StagedRing\1", message)  # an alias is printed as what it stands for
    return next((family for name, family in _FAMILIES.items() if name in message), _OTHER)


def _count_errors(text: str, report: Report) -> None:
    """A message is a line that begins flush behind the tool's mark, and the indented ones after it."""
    told = sum(map(int, re.findall(r"ERROR SUMMARY: (\d+) error", text)))
    # Not the exit code of the replay, which tells itself what went wrong.
    report.told = max(0, told - text.count("Target application returned an error"))
    # Of races: every one, warnings too.
    races = re.findall(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text)
    report.told += sum(int(number) for both in races for number in both)
    found = []
    remarks: Counter[str] = Counter()
    for message in re.findall(r"^========= \S.*(?:\n=========(?:  .*)?$)*", text, re.MULTILINE):
        head, *rest = message.splitlines()
        if "SUMMARY" not in head and any(" at " in line or "Access" in line for line in (head, *rest)):
            found.append((_family_of(message), message))
        elif re.match("=+ (Warning|Error|Internal)", head):
            remarks[head.strip("= ")] += 1
    report.messages += [f"{number} × {remark}" for remark, number in remarks.items()]

    blind = any(family == _HANDED_OVER and _accesses(message) for family, message in found)
    if blind:
        report.messages.append(
            "this version of racecheck does not follow barrier.cta.arrive: it reports the control that is handed over"
        )
    kinds: dict[str, Counter[str]] = {}
    shown: dict[str, str] = {}
    for family, message in found:
        result = report.families.setdefault(family, Result())
        accesses = _accesses(message)
        handover = blind and _is_handover(accesses)
        result.handovers, result.errors = result.handovers + handover, result.errors + (not handover)
        head, *rest = message.splitlines()
        if accesses:
            of_kind = sorted({f"{accesses[0]}, {other}" for other in accesses[1:]}) or [str(accesses[0])]
        else:
            of_kind = [f"{family}: {re.sub(r'0x[0-9a-f]+|[0-9]+', '#', head.strip('= '))}"]
        for kind in of_kind:
            kind += ", like the control's" * handover
            kinds.setdefault(kind, Counter())[family] += 1
            if not handover and family not in CONTROLS:
                shown.setdefault(kind, "".join(f"\n{line[:_SHOWN_COLUMNS]}" for line in (head, *rest)[:_SHOWN_LINES]))
    # Those that are errors first.
    for kind, families in sorted(kinds.items(), key=lambda item: item[0] not in shown)[:_SHOWN_KINDS]:
        where = ", ".join(f"{number} in {family}" for family, number in families.items())
        report.messages.append(f"{kind}: {where}{shown.get(kind, '')}")
    if len(kinds) > _SHOWN_KINDS:
        report.messages.append(f"{len(kinds) - _SHOWN_KINDS} more kinds: see its logs")


def row(tool: str, family: str, result: Result, there: int) -> str:
    """A line of the table."""
    counts = f"{result.cases} of {there}", len(result.cut_off), len(result.wrong), result.errors, result.handovers
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
    clean = True
    if not args.keep:
        args.folder.mkdir(parents=True, exist_ok=True)
        save([], args.folder)  # so that none are left of another recording
        command = [sys.executable, "-m", "benchmarks.sanitize.record", str(args.folder)]
        code = _run(command, sys.stdout.fileno(), args.record_seconds)
        if code != 0:
            why = f"failed with exit code {code}" if code is not None else "took too long: see --record-seconds"
            print(f"the recording {why}")
            clean = False
    launches = load(args.folder)
    families = [launch.family for launch in launches]
    there = Counter(families)

    clean &= bool(launches)
    rows = []
    for tool in args.tools:
        report = run_tool(
            functools.partial(_command, program if tool != "none" else None, tool),
            args.folder,
            tool,
            families,
            args.seconds,
            bare=tool == "initcheck",
        )
        rows += [row(tool, family, result, there[family]) for family, result in report.families.items()]
        clean &= judge(tool, report)
        # Now, in case a later one takes all the time that there is.
        print("".join(f"\n{tool}: {message}\n" for message in report.messages), end="", flush=True)
    print("\n| tool | family | cases | cut off | wrong | errors | handovers like the control's | seconds |")
    print("\n".join(["|---|---|---|---|---|---|---|---|", *rows, "", "clean" if clean else "NOT CLEAN"]))
    return int(not clean)


def judge(tool: str, report: Report) -> bool:
    """Whether all is well. Completes the report's messages."""
    for family, result in report.families.items():
        for words in (result.cut_off, result.wrong):
            more = [f"and {len(words) - 3} more"] * (len(words) > 3)
            report.messages += [f"{family}, " + "\n".join([*words[:3], *more])] * bool(words)
    if report.told != report.counted:
        report.messages.append(f"it itself tells of {report.told} errors; {report.counted} messages are counted here")
    if not report.reached:
        report.messages.append(f"it ran nothing: {report.last_words}")
    clean = report.clean and report.reached > 0
    if tool == "none":
        clean &= not any(of.cut_off for family, of in report.families.items() if family not in CONTROLS)
    if tool == "racecheck" and not report.families.get(_RACING, Result()).errors:
        report.messages.append("it does not report the control that is racing, so it tells nothing")
        clean = False
    return clean


def _command(program: str | None, tool: str, log: Path, without: Collection[str]) -> list[str]:
    """What replays launches, under a tool if there is a program; without the arguments of ``replay.py``."""
    replay = [sys.executable, "-m", "benchmarks.sanitize.replay"]
    if program is None:
        return replay
    options = {"--tool": tool, "--log-file": str(log), "--launch-timeout": "60", "--print-limit": str(_PRINT_LIMIT)}
    options |= {name: value for name, value in _OPTIONS.get(tool, {}).items() if name not in without}
    return [program, *(word for option in options.items() for word in option), *replay]


if __name__ == "__main__":
    sys.exit(main())

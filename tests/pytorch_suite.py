"""Runs PyTorch's own tests of its RNN, LSTM and GRU with ``elman.nn``'s in their place.

    git clone --depth 1 --branch v$(python -c 'import torch; print(torch.__version__.split("+")[0])') \\
        https://github.com/pytorch/pytorch ~/pytorch
    pip install expecttest
    python -m tests.pytorch_suite ~/pytorch --report docs/pytorch_tests.md

Of the checkout, which is to be of the installed release, it needs test/test_nn.py and test/test_modules.py. Every test
is run twice, with PyTorch's modules and with ours: one that passes with theirs must pass with ours. Ends with code 1 if
one does not.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import elman.nn

#: What each file's tests of these modules have in their names. Not RNNCell and its like, which stay PyTorch's.
SUITES = {
    "test/test_nn.py": "(rnn or lstm or gru or variable_sequence or pack_sequence or projections) and not cell",
    "test/test_modules.py": "nn_RNN_ or nn_LSTM_ or nn_GRU_",
}
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Result:
    """How one test ended, ``passed``, ``failed`` or ``skipped``, and why."""

    outcome: str
    why: str = ""


def substitute() -> None:
    """Makes ``torch.nn.LSTM`` and so on ours, everywhere where PyTorch's tests look for them."""
    for name in elman.nn.__all__:
        for namespace in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
            setattr(namespace, name, getattr(elman.nn, name))


def run(source: Path, file: str, ours: bool) -> dict[str, Result]:
    """The tests of one file by name, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        inside = [sys.executable, "-m", "tests.pytorch_suite", "--inside", "ours" if ours else "theirs"]
        done = subprocess.run([*inside, str(source), file, str(report)], cwd=_ROOT, text=True, capture_output=True)
        if not report.exists():
            sys.exit(f"{file} could not be run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
            ends = [part for part in case if part.tag in ("failure", "error", "skipped")]
            outcome = "passed" if not ends else "skipped" if ends[0].tag == "skipped" else "failed"
            found[name] = Result(outcome, (ends[0].get("message") or "").split("\n")[0][:160] if ends else "")
    if not found:
        sys.exit(f"{source / file} has no test of these modules:\n{done.stdout[-3000:]}")
    return found


def report(file: str, theirs: dict[str, Result], ours: dict[str, Result]) -> tuple[list[str], bool]:
    """Lines of Markdown, and whether ours passes all that theirs passes."""
    counts = collections.Counter((theirs[name].outcome, ours[name].outcome) for name in theirs)
    passed = counts["passed", "passed"]
    lines = [f"## {file}", "", f"{len(theirs)} tests of these modules: {passed} pass with both.", ""]
    good = theirs.keys() == ours.keys()
    for name in theirs:
        before, after = theirs[name], ours.get(name, Result("missing"))
        if before.outcome == "passed" != after.outcome:
            good = False
            lines.append(f"- **{name}** passes with PyTorch's, {after.outcome} with ours: {after.why}")
    whys: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    for name in theirs:
        if theirs[name].outcome != "passed":
            whys[theirs[name].outcome, ours[name].outcome, theirs[name].why].append(name)
    for (before, after, why), names in whys.items():
        what = f"{before} with both" if before == after else f"{before} with PyTorch's, {after} with ours"
        lines.append(f"- {what} ({why}): {', '.join(names)}")
    return [*lines, ""], good


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="checkout of PyTorch, of the installed release")
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    parser.add_argument("--inside", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.inside is not None:
        if args.inside == "ours":
            substitute()
        file, out = args.rest
        options = [
            "-c",
            os.devnull,
            "--rootdir",
            str(args.source),
            "--noconftest",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
        ]
        return int(pytest.main([*options, "--junitxml", out, "-k", SUITES[file], str(args.source / file)]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    lines = [f"PyTorch {torch.__version__} on {device}.", ""]
    good = True
    for file in SUITES:
        more, fine = report(file, run(args.source, file, ours=False), run(args.source, file, ours=True))
        lines += more
        good = good and fine
        print("\n".join(more), flush=True)
    if args.report is not None:
        args.report.write_text("\n".join(["# PyTorch's own tests with `elman.nn` in place of `torch.nn`", "", *lines]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

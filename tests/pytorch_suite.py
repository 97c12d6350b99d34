"""Runs PyTorch's own tests of its RNN, LSTM and GRU with ``elman.nn``'s in their place.

    git clone --depth 1 --branch v$(python -c 'import torch; print(torch.__version__.split("+")[0])') \\
        https://github.com/pytorch/pytorch ~/pytorch
    pip install expecttest
    python -m tests.pytorch_suite ~/pytorch --report docs/pytorch_tests.md

Of the checkout, best of the installed release, it needs version.txt, test/test_nn.py and test/test_modules.py; those of
2.4.0 on run too. Every test is run twice, with PyTorch's modules and with ours: one that passes with theirs must pass
with ours. Ends with code 1 if one does not.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal import common_cuda, common_mkldnn, common_nn, common_utils

import elman.nn

#: What each file's tests of these modules have in their names. Not RNNCell and its like, which stay PyTorch's.
SUITES = {
    "test/test_nn.py": "(rnn or lstm or gru or variable_sequence or pack_sequence or projections) and not cell",
    "test/test_modules.py": "nn_RNN_ or nn_LSTM_ or nn_GRU_",
}
#: What test_nn.py of 2.4.0 imports and 2.13.0 no longer has. None of the tests above is about it.
_GONE: tuple[tuple[Any, str, Any], ...] = (
    (common_cuda, "tf32_is_not_fp32", lambda: False),
    (common_mkldnn, "bf32_on_and_off", lambda *_, **__: lambda test: test),
    (common_nn, "new_module_tests", []),
    (common_utils, "skipIfMps", lambda test: test),
)
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Result:
    """How one test ended, ``passed``, ``failed`` or ``skipped``, and why."""

    outcome: str
    why: str = ""


def substitute() -> None:
    """Makes ``torch.nn.LSTM`` and so on ours, everywhere where PyTorch's tests look for them."""
    assert "torch.testing._internal.common_modules" not in sys.modules, "whose list of modules is made by then"
    for name in elman.nn.__all__:
        for namespace in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
            setattr(namespace, name, getattr(elman.nn, name))


def run(source: Path, file: str, ours: bool) -> dict[str, Result]:
    """The tests of one file by name, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        inside = [sys.executable, "-m", "tests.pytorch_suite", "--inside", "ours" if ours else "theirs"]
        # Before 2.6 a module was saved and loaded whole, which is refused since unless it is asked for.
        environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        command = [*inside, str(source), file, str(report)]
        done = subprocess.run(command, cwd=_ROOT, env=environment, text=True, capture_output=True)
        if done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not report.exists():
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


def family(name: str) -> str:
    """A test's name without its class, and without the module, mode, device and dtype that it is repeated for."""
    return re.sub(r"_nn_(RNN|LSTM|GRU)_.*|_(cpu|cuda)(_b?float\d+)?$", "", name.rpartition(".")[2])


def report(file: str, theirs: dict[str, Result], ours: dict[str, Result]) -> tuple[list[str], bool]:
    """Lines of Markdown, and whether ours passes all that theirs passes."""
    rows: dict[str, list[str]] = collections.defaultdict(list)
    for name in theirs:
        rows[family(name)].append(name)
    table, whys = [], []
    for row, names in rows.items():
        passed = [[name for name in names if results.get(name) == Result("passed")] for results in (theirs, ours)]
        others = {theirs[name].outcome: theirs[name].why for name in names if theirs[name].outcome != "passed"}
        why = "; ".join(f"{outcome}: {why}" for outcome, why in others.items())
        table.append(f"| `{row}` | {len(names)} | {len(passed[0])} | {len(passed[1])} | {why} |")
        for name in sorted(set(passed[0]) - set(passed[1])):
            after = ours.get(name, Result("missing"))
            whys.append(f"- **{name}** passes with PyTorch's, {after.outcome} with ours: {after.why}")
    both = sum(theirs[name] == ours.get(name) == Result("passed") for name in theirs)
    head = [
        f"## {file}",
        "",
        f"{len(theirs)} tests: {both} pass with both, {len(whys)} with PyTorch's modules alone.",
        "",
    ]
    columns = ["| test | cases | pass with `torch.nn` | pass with `elman.nn` | others |", "|---|---|---|---|---|"]
    return [*head, *columns, *table, "", *whys, *[""] * bool(whys)], not whys and theirs.keys() == ours.keys()


def about(release: str, device: str) -> list[str]:
    """What is run, in Markdown."""
    lines = [
        f"Every test is run twice, with the modules of PyTorch {torch.__version__} and with ours, on {device}.",
        f"The tests are those of PyTorch {release}; `python -m tests.pytorch_suite` runs them and makes this page.",
        "They are selected by words in their names, without those of `RNNCell` and its like, which stay PyTorch's:",
        "",
        *(f"- of {file}: `{words}`" for file, words in SUITES.items()),
        "",
    ]
    if release != torch.__version__.partition("+")[0]:
        gone = ", ".join(f"`{name}`" for _, name, _ in _GONE)
        lines += [
            f"The tests are older than the modules. What they import and is gone since ({gone})",
            "is stood in for: no selected test is about it. And `torch.load` reads whole modules, as before 2.6.",
            "",
        ]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="checkout of PyTorch, of the installed release")
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    parser.add_argument("--inside", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.inside is not None:
        for module, name, value in _GONE:
            if not hasattr(module, name):
                setattr(module, name, value)
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
    lines = about((args.source / "version.txt").read_text().strip(), device)
    good = True
    for file in SUITES:
        more, fine = report(file, run(args.source, file, ours=False), run(args.source, file, ours=True))
        lines += more
        good = good and fine
        print("\n".join(more), flush=True)
    if args.report is not None:
        head = ["# PyTorch's own tests with `elman.nn` in place of `torch.nn`", ""]
        args.report.write_text("\n".join([*head, *lines]).rstrip() + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""What README and pages tell users to type is parsed, and run at small sizes; their Python runs as it is."""

import functools
import importlib.util
import io
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.assemble import PAGES, ROOT, commands_below
from elman import cli, mixers
from elman.contract import CHECKS
from tests import test_model

PAGE_FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(PAGES.glob("*.md"))]
RUN = Path("runs/e1-20260101-120000")

#: What replaces options of a training run here, and what every run that is not resumed gets.
SMALLER = {
    ("--params", "10m"): "--dim 16 --depth 2",
    ("--params", "50m"): "--dim 16 --depth 2",
    ("--time-limit", "10m"): "--steps 2",
    ("--time-limit", "20m"): "--steps 4",
    ("--params", "500k"): "--dim 16 --depth 2",
    ("--steps", "5000"): "",
    ("--bytes", "500"): "--bytes 8",
    ("--bytes", "1000"): "--bytes 8",
}
TINY = "--seq-len 32 --batch-size 4 --eval-bytes 200 --device cpu"
TINY_TASK = "--steps 2 --batch-size 4 --eval-examples 16 --device cpu"
#: Commands of which the study's own folder, or any run's, is needed: the one that is recorded here.
RECORDED = ROOT / "docs/results/ladder_50m"
REPLACED = {
    "elman check my_cell.py": f"elman check {ROOT}/docs/examples/mgu.py",
    "elman study report ladder_50m": f"elman study report ladder_50m --folder {RECORDED} --out report",
    "elman study pack ladder_50m --out ladder_results": f"elman study pack ladder_50m --folder {RECORDED} --out packed",
    "elman study run ladder_50m --data corpus.txt --dry-run": "elman study run ladder_50m --scale tiny --dry-run",
    "elman compare runs/ladder_50m/runs/A runs/ladder_50m/runs/B": "elman compare "
    + " ".join(map(str, sorted((RECORDED / "runs").iterdir())[:2])),
}
#: Commands that are parsed where they are elman's, but not run here, by how they begin, and why.
NOT_RUN = {
    "make ": "makes a virtual environment; that the target is there is looked up",
    "pip install ": "installs",
    ".venv/bin/pre-commit ": "installs a hook into the clone",
    "torchrun ": "wants eight processes",
    "elman data pack hf:": "fetches a data set",
    "elman study run ladder_50m --data corpus.txt": "trains for five hours",
    "elman study run ladder_50m --scale tiny": "trains for minutes",
    "elman study run state_tracking --jobs": "trains for hours",
    "elman study report state_tracking": "wants the study's runs",
    "python -m pytest ": "runs the tests inside the tests",
}


def commands(page: Path) -> list[str]:
    """Commands in a page's blocks of shell."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").split("\n")
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def elman_arguments(command: str) -> list[str] | None:
    """What elman is given by a command; None where it is not asked."""
    for start in (r"elman ", r"(?:torchrun [^ ]+|python) -m elman "):
        if found := re.match(start, command):
            return shlex.split(command[found.end() :])
    if found := re.match(r"(?:torchrun [^ ]+|python) train_ladder.py ", command):
        return ["train", *shlex.split(command[found.end() :])]
    return None


def smaller(arguments: list[str]) -> list[str]:
    """The same at a size that takes no time."""
    words: list[str] = []
    for word in arguments:
        words.append(word)
        if tuple(words[-2:]) in SMALLER:
            words[-2:] = SMALLER[tuple(words[-2:])].split()
    if words[0] == "train" and "--resume" not in words:
        words += TINY.split()
    if words[0] == "task":
        words += TINY_TASK.split()
    return words


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").write_bytes(b"import os\n\x1e" * 300)
    arguments = f"train --data {folder / 'text'} --out {folder / 'run'} --steps 2 --dim 16 --depth 2 {TINY}"
    assert cli.main(arguments.split()) == 0
    return folder / "run"


@pytest.fixture
def workplace(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the pages' user sits: a home with a corpus in it, and a run of the name that the pages use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        (tmp_path / "corpus" / f"{number}.py").write_text("import os\nprint(os.name)\n" * 20, encoding="utf-8")
    (tmp_path / "book.txt").write_text("import os\n" * 20, encoding="utf-8")
    shutil.copytree(trained, tmp_path / RUN)
    shutil.copytree(trained, tmp_path / "RUN")
    # Who is asked for a line ends at once.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    return tmp_path


def reason_not_to_run(command: str) -> str | None:
    if command in REPLACED:
        return None
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


@pytest.mark.parametrize("page", [page for page in PAGE_FILES if commands(page)], ids=lambda page: page.name)
def test_commands_parse_and_run(page: Path, workplace: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for command in commands(page):
        arguments = elman_arguments(command.replace("'~/corpus'", "corpus"))
        if command.startswith("make "):
            assert shlex.split(command)[1] in targets, command
        elif arguments is not None:
            cli.parse(arguments)
        if reason_not_to_run(command) is None:
            assert arguments is not None, f"say in NOT_RUN why this is not run: {command}"
            if command in REPLACED:
                arguments = elman_arguments(REPLACED[command])
                assert arguments is not None
            assert cli.main(smaller(arguments)) == 0, command


def test_what_is_not_run_or_replaced_is_there() -> None:
    every = [command for page in PAGE_FILES for command in commands(page)]
    for start in NOT_RUN:
        assert any(command.startswith(start) and command not in REPLACED for command in every), start
    assert set(REPLACED) <= set(every)
    words = " ".join(every)
    for option, value in SMALLER:
        assert f"{option} {value}" in words


def test_every_fence_says_its_language() -> None:
    for page in PAGE_FILES:
        opening = re.findall(r"^```(.*)\n(?:.*\n)*?^```$", page.read_text(encoding="utf-8"), re.MULTILINE)
        if page.name != "CONTRIBUTING.md":
            assert all(opening), page.name
        assert set(opening) <= {"", "sh", "text", "python", "{toctree}", "{eval-rst}"}, page.name


@pytest.mark.parametrize("page", PAGE_FILES, ids=lambda page: page.name)
def test_commands_of_transcripts_parse(page: Path, workplace: Path) -> None:
    """What stands behind ``$`` in a block of text."""
    blocks = re.findall(r"^```text\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for command in re.findall(r"^\$ elman (.*)", "".join(blocks).replace("\\\n", " "), re.MULTILINE):
        cli.parse(shlex.split(command))


@functools.cache
def command_names() -> set[tuple[str, ...]]:
    return {names for names, _ in commands_below()}


def spans() -> Iterator[str]:
    """Commands that stand in the midst of a sentence."""
    for page in PAGE_FILES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        yield from (" ".join(span.split()) for span in re.findall(r"`((?:elman|python -m) [^`…]+)`", prose))


@pytest.mark.parametrize("span", sorted(set(spans())))
def test_commands_in_sentences_parse(span: str, workplace: Path) -> None:
    if found := re.match(r"python -m ([\w.]+)", span):
        assert importlib.util.find_spec(found[1]) is not None
        return
    words = shlex.split(span)[1:]
    if tuple(words) in command_names():
        return
    if words == ["--version"]:
        assert cli.main(words) == 0
        return
    stands_for = {"RUN": str(RUN), "RUN...": str(RUN), "my_study.py": "ladder_50m"}
    words = [stands_for.get(word, word) for word in words]
    words = [
        "e1" if a == "--model" else "ladder_50m" if b == "NAME" else b
        for a, b in zip(["", *words], words, strict=False)
    ]
    if "--help" not in words:
        cli.parse(words)
        return
    with pytest.raises(SystemExit) as end:
        cli.parse(words)
    assert end.value.code == 0


@pytest.mark.parametrize(
    "page", [p for p in PAGE_FILES[2:] if "```python" in p.read_text()], ids=lambda page: page.name
)
def test_python_blocks_run(page: Path, workplace: Path) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(block, names)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked examples are registered, as a user would."""
    monkeypatch.setitem(mixers._REGISTRY, "glu", "docs.examples.glu:GLUConfig")
    monkeypatch.setitem(mixers._REGISTRY, "mgu", "docs.examples.mgu:MGUConfig")


@pytest.mark.parametrize(
    ("name", "options"),
    [("glu", {}), ("glu", {"gate": "relu", "expansion": 1.5}), ("mgu", {}), ("mgu", {"expansion": 0.5})],
    ids=str,
)
def test_a_worked_example_is_a_variant(examples: None, name: str, options: dict[str, object]) -> None:
    mixer = mixers.mixer_config(name)(**options)
    for check in CHECKS:
        check.run(mixer)
    test_model.test_a_model_starts_as_its_embedding_and_every_parameter_learns(mixer)
    test_model.test_config_survives_json(mixer)


@pytest.mark.parametrize("options", ["glu --gate relu", "mgu"])
def test_a_worked_example_trains_and_writes(examples: None, options: str, workplace: Path) -> None:
    Path("text").write_bytes(b"import os\n\x1e" * 300)
    argv = f"train --model {options} --data text --steps 2 --dim 16 --depth 2 {TINY} --out run"
    assert cli.main(argv.split()) == 0
    assert cli.main(["generate", "run", "--bytes", "4"]) == 0
    assert os.path.exists("run/summary.json")

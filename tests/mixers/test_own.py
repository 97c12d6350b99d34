"""A variant in a file outside the package: ``--model FILE``."""

import json
import os
import pickle
import py_compile
import shutil
from pathlib import Path

import pytest

from elman.cli import main
from elman.errors import UsageError
from elman.mixers import mixer_config, own, parse_pattern, pattern_mixers
from elman.model import ModelConfig
from elman.training.run import open_run

EXAMPLE = Path(__file__).parents[2] / "docs/examples/mgu.py"
SIZES = {"--dim": 16, "--depth": 2, "--seq-len": 16, "--batch-size": 2, "--eval-bytes": 200, "--device": "cpu"}
SMALL = [str(word) for pair in SIZES.items() for word in pair]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Beside the text, in a folder whose name has a space and letters of both cases."""
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "My cells").mkdir()
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 60)
    return shutil.copy(EXAMPLE, tmp_path / "My cells/mgu.py")


def train(file: Path, out: str, steps: int, *more: str, model: str = "") -> int:
    root = file.parents[1]
    where = ["--data", str(root / "text"), "--out", str(root / out)]
    return main(["train", "--model", model or str(file), *SMALL, "--steps", str(steps), *where, *more])


def refusal(capture: pytest.CaptureFixture[bytes], *arguments: str) -> str:
    """In one line."""
    assert main(list(arguments)) == 2
    return " ".join(capture.readouterr().err.decode().split())


def losses(file: Path, out: str) -> list[float]:
    return [row["loss"] for row in open_run(file.parents[1] / out).read_metrics() if "lr" in row]


def test_it_trains_goes_on_and_writes_as_any_other(file: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    root = file.parents[1]
    assert train(file, "whole", 6, "--expansion", "2") == 0
    assert train(file, "again", 6, "--expansion", "2") == 0
    assert losses(file, "again") == losses(file, "whole")
    saved = json.loads((root / "whole/config.json").read_text())["model"]["mixers"][0]
    assert saved.pop("code") == mixer_config(str(file)).code
    assert saved == {"name": "mgu", "expansion": 2.0}
    assert (root / "whole/variant-mgu.py").read_bytes() == file.read_bytes()
    assert main(["train", "--resume", str(root / "whole"), "--steps", "8"]) == 0
    assert len(losses(file, "whole")) == 8
    assert main(["generate", str(root / "whole"), "--prompt", "abc", "--bytes", "5"]) == 0
    assert main(["compare", str(root / "whole"), str(root / "again")]) == 0
    assert b"mgu" in capfdbinary.readouterr().out


def test_it_stands_in_patterns_with_options_of_its_own(file: Path) -> None:
    assert parse_pattern(f"E1, {file}") == ("e1", "mgu")
    assert train(file, "run", 1, "--mgu.expansion", "2", "--e1.bound", "3", model=f"e1,{file}") == 0
    _, model = open_run(file.parents[1] / "run").read_config()
    assert model.pattern == "e1,mgu"
    assert [mixer.expansion for mixer in model.mixers] == [1.0, 2.0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("cache", ["on", "off"])
def test_other_processes_load_it_too(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: str) -> None:
    """As a study's do, which are sent the model's config."""
    monkeypatch.setenv("ELMAN_CACHE", "off" if cache == "off" else str(tmp_path / "cache"))
    monkeypatch.setattr(own, "_LOADED", {})
    model = ModelConfig(8, 1, pattern_mixers(str(file)))
    sent = pickle.dumps(model)
    monkeypatch.setattr(own, "_LOADED", {})
    found = pickle.loads(sent)
    assert found.to_dict() == model.to_dict()
    if cache == "off":
        monkeypatch.setattr(own, "_LOADED", {})
        file.write_text(file.read_text() + "# changed\n")
        with pytest.raises(UsageError, match="has never been run here"):
            pickle.loads(sent)


def test_a_run_is_opened_by_the_code_that_trained_it(
    file: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file has become since, which makes another model."""
    root = file.parents[1]
    assert train(file, "first", 4) == 0
    text = file.read_text()
    file.write_text(text.replace("torch.tanh(", "torch.sin("))
    assert train(file, "second", 4) == 0
    file.unlink()
    monkeypatch.setattr(own, "_LOADED", {})
    for out, word in (("first", "tanh"), ("second", "sin")):
        assert main(["train", "--resume", str(root / out), "--steps", "5"]) == 0
        assert f"torch.{word}(" in (root / out / "variant-mgu.py").read_text()
    assert losses(file, "first")[:4] != losses(file, "second")[:4]
    capfdbinary.readouterr()
    assert main(["compare", str(root / "first"), str(root / "second")]) == 0
    shown = capfdbinary.readouterr().out.decode()
    for out in ("first", "second"):
        (mixer,) = open_run(root / out).read_config()[1].mixers
        assert str(mixer.code)[:7] in shown


def test_what_is_run_is_the_text_and_no_bytecode_beside_it(file: Path) -> None:
    """Python takes a file of the same size and second for the one that it has compiled."""
    found = []
    for word in ("this", "that"):
        file.write_text(EXAMPLE.read_text().replace("h = (1 − f) h", f"{word} is (1 − f) h"))
        os.utime(file, (1e9, 1e9))
        py_compile.compile(str(file))
        file.write_text(file.read_text().replace(f"{word} is", f"{word[::-1]} is"))
        os.utime(file, (1e9, 1e9))
        found.append(mixer_config(str(file)).equation[:4])
    assert found == ["siht", "taht"]


@pytest.mark.parametrize("name", ["mgu", "../run/variant-mgu.py", "run/variant-mgu.py", "~/variant-mgu.py"])
def test_code_that_came_with_a_run_is_not_run(
    file: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = file.parents[1]
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root / "run"))
    assert train(file, "run", 1) == 0
    monkeypatch.setattr(own, "_LOADED", {})
    monkeypatch.setenv("ELMAN_CACHE", str(root / "anothers"))
    copy, ran = root / "run/variant-mgu.py", root / "ran"
    copy.write_text(copy.read_text() + f"open({str(ran)!r}, 'w')\n")
    config = json.loads((root / "run/config.json").read_text())
    config["model"]["mixers"][0] |= {"name": name, "code": own._hash(copy.read_bytes())}
    (root / "run/config.json").write_text(json.dumps(config))
    for command in (
        ["generate", "run", "--prompt", "a"],
        ["report", "run"],
        ["train", "--resume", "run", "--steps", "2"],
    ):
        assert main(command) != 0
        shown = capfdbinary.readouterr()
        why = "never been run here" if name == "mgu" else "is no variant's name"
        assert why in " ".join((shown.out + shown.err).decode().split())
    if name == "mgu":
        del config["model"]["mixers"][0]["code"]
        config["model"]["mixers"][0]["name"] = str(copy)
        (root / "run/config.json").write_text(json.dumps(config))
        assert main(["generate", "run", "--prompt", "a"]) == 2
    assert not ran.exists()


def test_it_is_run_once_it_has_been_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = file.parents[1]
    assert train(file, "run", 1) == 0
    monkeypatch.setattr(own, "_LOADED", {})
    monkeypatch.setenv("ELMAN_CACHE", str(root / "anothers"))
    with pytest.raises(
        UsageError, match=r"read .*variant-mgu\.py, and let it be known by: elman check .*variant-mgu\.py"
    ):
        open_run(root / "run").read_config()
    assert main(["check", str(root / "run/variant-mgu.py")]) == 0
    assert open_run(root / "run").read_config()[1].pattern == "mgu"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read (No such file or directory): give the file of a variant, or a variant's name"),
        ("import sys\nsys.exit(0)\n", "fails, line 2: SystemExit: 0"),
        ("x = 1\ny = x / 0\n", "fails, line 2: ZeroDivisionError: division by zero"),
        ("def f(:\n", "fails: SyntaxError"),
        ("import no_such_module\n", "fails, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "from elman.mixers.e1 import E1Config\n",
            "must have one config class of a variant, with a name, but has none",
        ),
        ("{mgu}\nclass Two(MGUConfig):\n    name: ClassVar[str] = 'two'\n", "but has MGUConfig, Two"),
    ],
)
def test_what_is_no_variant_is_refused(tmp_path: Path, text: str | None, told: str) -> None:
    file, mgu = tmp_path / "mine.py", EXAMPLE.read_text()
    if text is not None:
        file.write_text(text.replace("{mgu}", mgu))
    with pytest.raises(UsageError, match=r"mine\.py") as refused:
        mixer_config(str(file))
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ('= "mgu"', '= "e1"', "'e1', which another variant has: give it a name of its own"),
        ('= "mgu"', '= "elman"', "which another variant has"),
        ('= "mgu"', '= "my unit"', "which is no name"),
        ("@dataclass(frozen=True)", "@dataclass", "cannot inherit non-frozen"),
        ("@dataclass(frozen=True)", "", "is no dataclass: write @dataclass(frozen=True) above it"),
    ],
)
def test_a_name_is_one_of_its_own_and_a_config_is_frozen(tmp_path: Path, right: str, wrong: str, told: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(EXAMPLE.read_text().replace(right, wrong))
    with pytest.raises(UsageError, match=r"mine\.py") as refused:
        mixer_config(str(file))
    assert told in str(refused.value)


def test_two_of_one_name_are_not_told_apart(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(file.read_text() + "# another\n")
    with pytest.raises(UsageError, match=r"two variants 'mgu', of two files: rename one"):
        pattern_mixers(f"{file},{other}")


def test_an_export_has_elmans_own_code_alone(file: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run = file.parents[1] / "run"
    assert train(file, "run", 1) == 0
    told = refusal(capfdbinary, "export", str(run), "--to", "hf")
    assert "an export has elman's own code alone: move its file to elman/mixers" in told
    assert not (run / "hf").exists()

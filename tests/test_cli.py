"""The commands as a user types them: what they print, and one clear line for every mistake."""

import contextlib
import io
import json
import os
import pty
import re
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import elman
from elman.cli import main
from elman.generation import Decoder
from elman.model import LanguageModel
from elman.training.run import RunFolder

TINY = ["--dim", "16", "--depth", "2", "--seq-len", "32", "--batch-size", "4", "--eval-bytes", "200", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("text").write_bytes(b"".join(b"line %d of a text\n\x1e" % i for i in range(500)))
    Path("short").write_bytes(b"too short")
    Path("empty").touch()
    Path("folder").mkdir()
    os.mkfifo("fifo")
    Path("link").symlink_to("nowhere")
    return tmp_path


def run(*argv: object) -> int:
    try:
        return main([str(argument) for argument in argv])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def trained(folder: Path) -> Path:
    assert run("train", "--data", "text", "--steps", 3, *TINY, "--out", "trained") == 0
    return folder / "trained"


BAD_INPUT = {
    "missing data": (["--data", "nowhere", "--steps", "1"], "--data nowhere: no such file"),
    "empty data": (["--data", "empty", "--steps", "1"], "--data empty is empty"),
    "folder for data": (["--data", "folder", "--steps", "1"], "--data folder is a folder: .*elman data pack folder"),
    "short data": (["--data", "short", "--steps", "1"], "--seq-len 32 needs windows of 33 bytes"),
    "long window": (["--data", "text", "--steps", "1", "--seq-len", "20000"], "--seq-len 20000 needs windows"),
    "long held-out window": (["--data", "text", "--steps", "1", "--seq-len", "900"], "the held-out part has"),
    "unknown model": (["--model", "e01", "--steps", "1"], "'e01' is unknown: did you mean e1 or e"),
    "unknown level": (["--level", "77", "--steps", "1"], "'e77' is unknown"),
    "bad params": (["--params", "50x", "--steps", "1"], "--params '50x' is no count"),
    "zero params": (["--params", "0", "--steps", "1"], "--params '0' is no count"),
    "params beyond memory": (
        ["--params", "100b", "--data", "text", "--steps", "1"],
        "needs .*TiB for weights and optimiser",
    ),
    "params no width fits": (["--params", "100", "--data", "text", "--steps", "1"], "cannot be met within 2%"),
    "zero width": (["--dim", "0", "--steps", "1"], "--dim 0 is out of range"),
    "zero depth": (["--depth", "0", "--steps", "1"], "--depth 0 is out of range"),
    "no end": (["--data", "text"], "a run needs an end: give --steps N"),
    "zero steps": (["--steps", "0"], "--steps 0 is out of range"),
    "negative steps": (["--steps", "-3"], "--steps -3 is out of range"),
    "zero time": (["--time-limit", "0s"], "--time-limit '0s' is no duration"),
    "absurd time": (["--time-limit", "soon"], "--time-limit 'soon' is no duration"),
    "zero lr": (["--lr", "0", "--steps", "1"], "--lr 0.0 is out of range"),
    "nan lr": (["--lr", "nan", "--steps", "1"], "--lr nan is out of range"),
    "nan decay": (["--weight-decay", "nan", "--steps", "1"], "--weight-decay nan is out of range"),
    "zero batch": (["--batch-size", "0", "--steps", "1"], "--batch-size 0 is out of range"),
    "uneven parts": (["--grad-accum", "3", "--steps", "1"], "--grad-accum 3 does not divide --batch-size 4"),
    "a step and a half": (["--warmup", "1.5", "--steps", "1"], "--warmup 1.5 is neither: give whole steps"),
    "negative seed": (["--seed", "-1", "--steps", "1"], "--seed -1 is out of range"),
    "huge seed": (
        ["--seed", "99999999999999999999", "--steps", "1"],
        "--seed 9+ is out of range: .* at most 9007199254740992",
    ),
    "huge steps": (["--steps", "1" + "0" * 400], "--steps 10+ is out of range"),
    "too many streams": (
        ["--tbptt", "--data", "text", "--steps", "1", "--batch-size", "400"],
        "--sampling tbptt reads --batch-size 400 streams by --seq-len 32 bytes, but the training part has .*: give a",
    ),
    "streams and documents": (
        ["--tbptt", "--sampling", "documents", "--steps", "1"],
        "--tbptt is short for --sampling",
    ),
    "streams of attention": (
        ["--tbptt", "--model", "transformer", "--data", "text", "--steps", "1"],
        "--sampling tbptt carries .* transformer grows with the text: give --sampling documents or windows",
    ),
    "negative workers": (["--workers", "-1", "--steps", "1"], "--workers -1 is out of range"),
    "unused variant": (
        ["--model", "e0,e1,e0", "--data", "text", "--steps", "1"],
        "pattern of 3 layers, but the depth is 2",
    ),
    "negative statistics": (["--stats-every", "-1", "--steps", "1"], "--stats-every -1 is out of range"),
    "graph on a CPU": (
        ["--graph", "on", "--data", "text", "--steps", "1"],
        "--graph on: a CUDA graph needs an NVIDIA GPU, not device cpu: give --graph off",
    ),
    "bad heldout": (["--heldout", "2", "--data", "text", "--steps", "1"], "--heldout 2.0 is out of range"),
    "bad eval bytes": (["--eval-bytes", "many", "--steps", "1"], "--eval-bytes 'many' is no count"),
    "missing package": (["--model", "fla:GLA", "--steps", "1"], "fla:GLA needs flash-linear-attention"),
    "bad expansion": (["--expansion", "-1", "--steps", "1"], "--expansion -1.0 is out of range"),
    "structure and constraint": (
        ["--structure", "low_rank", "--constraint", "scaled_orthogonal", "--steps", "1"],
        "--constraint scaled_orthogonal does not go with --structure low_rank.*: give --structure dense or",
    ),
    "size of another structure": (["--rank", "4", "--steps", "1"], "--rank 4 means nothing to --structure dense"),
    "rank above the width": (
        ["--structure", "low_rank", "--rank", "17", "--data", "text", "--steps", "1"],
        "--rank 17 is more than the 16 units of W_h: give at most 16",
    ),
    "unknown device": (["--device", "tpu", "--data", "text", "--steps", "1"], "--device 'tpu' is unknown"),
    "missing device": (["--device", "cuda:99", "--data", "text", "--steps", "1"], "--device cuda:99: "),
    "out is a file": (["--data", "text", "--steps", "1", "--out", "short"], "--out short is a file"),
    "out under a file": (["--data", "text", "--steps", "1", "--out", "short/run"], "--out short/run cannot be made"),
    "resume nothing": (["--resume", "nowhere"], "--resume nowhere: no such folder"),
    "resume no run": (["--resume", "folder"], "--resume folder is no run folder"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_a_mistake_in_train_is_one_clear_line(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = BAD_INPUT[name]
    before = sorted(folder.rglob("*"))
    defaults = (
        []
        if "--resume" in argv
        else [TINY[i] for k in range(0, len(TINY), 2) if TINY[k] not in argv for i in (k, k + 1)]
    )
    if "--params" in argv:
        defaults = defaults[4:]
    assert run("train", *defaults, *argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.search(message, line), line
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "nowhere"], "RUN nowhere: no such folder"),
        (["generate", "folder"], "is no run folder"),
        (["generate", "trained", "--bytes", "-1"], "--bytes -1 is out of range"),
        (["generate", "trained", "--top-k", "0"], "--top-k 0 is out of range"),
        (["generate", "trained", "--prompt-file", "nowhere"], "--prompt-file nowhere: no such file"),
        (["generate", "trained", "--prompt-file", "folder"], "--prompt-file folder is a folder"),
        (["generate", "trained", "--interactive", "--prompt", "a", "--prompt", "b"], "2 prompts were given: give one"),
        (["generate", "trained", "--temperature", "-1"], "--temperature -1.0 is out of range"),
        (["generate", "trained", "--top-p", "0"], "--top-p 0.0 is out of range"),
        (["train", "--resume", "trained", "--seed", "5"], "--seed cannot change when a run goes on"),
        (["train", "--resume", "trained", "--gate", "hx"], "--gate cannot change when a run goes on"),
        (["train", "--resume", "trained"], "has reached its end"),
        (["train", "--data", "text", "--steps", "1", *TINY, "--out", "trained"], "holds another run"),
        (["train", "--start-from", "nowhere", "--steps", "1"], "--start-from nowhere: no such folder"),
        (
            ["train", "--start-from", "trained", "--dim", "8", "--steps", "1"],
            "--dim 8 is of no use beside --start-from",
        ),
        (["train", "--start-from", "trained", "--model", "e0", "--steps", "1"], "a run of e1, not e0: drop --model"),
        (
            ["train", "--start-from", "trained", "--data", "text", "--seq-len", "8", "--gate", "hx", "--steps", "1"],
            "--start-from trained: .* is missing but config.json asks for .* or drop what makes this model another",
        ),
        (["task", "parity", "--start-from", "trained", "--steps", "1"], "is a run of 256 tokens, where this has"),
        (["data", "info", "nowhere"], "FILE nowhere: no such file"),
        (["data", "info", "empty"], "FILE empty is empty"),
        (["data", "info", "fifo"], "FILE fifo is no regular file"),
        (["data", "pack", "fifo", "--out", "new"], "PATH fifo is no regular file"),
        (["data", "pack", "text", "--out", "link"], "--out link exists already"),
        (["data", "pack", "text", "--out", "x" * 300], "File name too long"),
        (["generate", "x" * 300], "File name too long"),
        (["generate", "trained", "--temperature", "101"], "--temperature 101.0 is out of range"),
        (["generate", "trained", "--seed", "1" + "0" * 30], "--seed 10+ is out of range"),
        (["generate", "a\x1b[31m\nb"], "RUN a␛.31m␊b: no such folder"),
        (["data", "pack", "nowhere", "--out", "new"], "PATH nowhere: no such file"),
        (["data", "pack", "text", "--out", "short"], "--out short exists already"),
        (["data", "pack", "text", "--out", "short/new"], "--out short/new cannot be written"),
        (["data", "pack", "hf:x", "text", "--out", "new"], "PATH hf:x text: a data set is packed alone"),
        (["data", "pack", "hf:x", "--out", "short"], "--out short exists already"),
        (["models", "--params", "50x"], "--params '50x' is no count"),
        (["models", "--depth", "0"], "--depth 0 is out of range"),
        (["tasks", "parity", "--seed", "-1"], "--seed -1 is out of range"),
    ],
)
def test_a_mistake_elsewhere_is_one_clear_line(
    argv: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    before = {
        path: path.stat().st_mtime_ns for path in trained.parent.rglob("*") if path.is_file() and path.name != ".lock"
    }
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    after = [path for path in trained.parent.rglob("*") if path.is_file() and path.name != ".lock"]
    assert before == {path: path.stat().st_mtime_ns for path in after}


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--stepz", "3"],
        ["train", "--model"],
        ["train", "--resume"],
        ["train", "--steps", "x"],
        ["train", "--gate", "foo"],
        ["fly"],
        ["data"],
        [],
    ],
)
def test_options_that_do_not_parse_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_damaged_checkpoints_are_one_clear_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = trained / "checkpoints" / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for argv in (["generate", trained], ["train", "--resume", trained, "--steps", 9]):
        capsys.readouterr()
        assert run(*argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "model.safetensors was cut short or changed; there is no whole one before it" in line
    (trained / "config.json").write_text('{"train": {}}')
    assert run("generate", trained) == 2
    assert "is not as elman train wrote it" in capsys.readouterr().err


def test_generate_goes_by_the_checkpoint_before_a_damaged_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", "text", "--steps", 3, *TINY, "--save-every", 2, "--out", "trained") == 0
    weights = folder / "trained" / "checkpoints" / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    capsys.readouterr()
    assert run("generate", "trained", "--bytes", 0) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("model.safetensors was cut short or changed; going by step-00000002, which is whole")


def test_train_ladder_is_train(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parent.parent / "train_ladder.py"
    options = ["--level", "1", "--params", "100k", "--depth", "2", "--data", "text", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [str(script), *options, *TINY[4:]])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code
    assert "held-out loss" in capsys.readouterr().out
    (made,) = (folder / "runs").iterdir()
    assert made.name.startswith("e1-")


def test_each_variant_shows_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    for model, options in (("e0", "{none,input}"), ("e1", "{split,hx,sigmoid}"), ("e5", "{input,none}")):
        assert run("train", "--model", model, "--help") == 0
        assert options in capsys.readouterr().out
    assert run("train", "--model", "e0,e1", "--help") == 0
    shown = capsys.readouterr().out
    assert "--e0.gate" in shown
    assert "--e1.gate" in shown


def test_a_pattern_of_variants_trains_and_resumes(folder: Path) -> None:
    argv = ["--model", "e0,e1", "--e0.gate", "input", "--data", "text", *TINY, "--out", "mixed"]
    assert run("train", *argv, "--steps", 2) == 0
    assert run("train", "--resume", "mixed", "--steps", 3) == 0


def test_a_hybrid_with_options_of_its_parts_trains_and_says_what_ran(folder: Path) -> None:
    options = "--mamba2.d-state 8 --lstm.kernels elman --transformer.mlp 2"
    argv = ["--model", "e1,mamba2,lstm,transformer,mingru", *options.split(), "--data", "text", *TINY, "--depth", 5]
    assert run("train", *argv, "--steps", 2, "--out", "hybrid") == 0
    (session,) = json.loads(Path("hybrid/env.json").read_text())
    assert session["backends"] == ["reference", "torch", "reference", "sdpa", "scan"]
    assert run("generate", "hybrid", "--bytes", 5) == 0


def test_a_named_pattern_trains_with_its_options_or_those_given(folder: Path) -> None:
    given = ["--matrix.conv", "0", "--matrix.bound", "1"]
    for out, options, settings in (("named", [], (4, 4.0)), ("given", given, (0, 1.0))):
        assert run("train", "--model", "elman", *options, "--data", "text", *TINY, "--steps", 1, "--out", out) == 0
        matrix = RunFolder(Path(out)).read_config()[1].mixers[0]
        assert (matrix.name, (matrix.conv, matrix.bound)) == ("matrix", settings)


def test_a_run_starts_from_the_weights_of_another(folder: Path) -> None:
    """As many steps of next to no learning rate leave the loss where that run had it; resumed, it says so still."""
    argv = ["--data", "text", "--seq-len", "8", "--batch-size", "2", "--eval-bytes", "100"]
    assert (
        run("train", "--model", "elman", *argv, "--dim", 16, "--depth", 2, "--lr", "0.01", "--steps", 5, "--out", "a")
        == 0
    )
    assert run("train", "--start-from", "a", *argv, "--lr", "1e-9", "--steps", 1, "--out", "b") == 0
    assert run("train", "--resume", "b", "--steps", 2) == 0
    assert (
        run("train", "--model", "elman", *argv, "--dim", 16, "--depth", 2, "--lr", "1e-9", "--steps", 1, "--out", "c")
        == 0
    )
    first, then, fresh = (
        json.loads(Path(name, "summary.json").read_text())["heldout"]["nats_per_byte"] for name in "abc"
    )
    assert then == pytest.approx(first, abs=1e-5)
    assert abs(fresh - first) > 1e-3
    config, model = RunFolder(Path("b")).read_config()
    assert config.start_from == Path("a").absolute()
    assert model == RunFolder(Path("a")).read_config()[1]
    sessions = json.loads(Path("b/env.json").read_text())
    assert [session["started_from"] for session in sessions] == [
        str(Path("a/checkpoints/step-00000005").absolute()),
        None,
    ]


def test_streams_train_and_resume_and_say_so(folder: Path) -> None:
    argv = ["--data", "text", *TINY]
    assert run("train", "--tbptt", *argv, "--steps", 2, "--out", "short") == 2  # a file is there
    assert run("train", "--tbptt", *argv, "--steps", 2, "--out", "streams") == 0
    assert json.loads(Path("streams/config.json").read_text())["train"]["sampling"] == "tbptt"
    assert run("train", "--resume", "streams", "--tbptt", "--steps", 3) == 0
    assert run("train", "--resume", "streams", "--steps", 4) == 0
    assert run("train", "--resume", "streams", "--sampling", "windows", "--steps", 5) == 2
    assert run("generate", "streams", "--bytes", 5) == 0


def test_a_data_set_is_packed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rows(list):  # type: ignore[type-arg]
        column_names = ("id", "body")

        def select_columns(self, names: list[str]) -> list[dict[str, str]]:
            return [{name: row[name] for name in names} for row in self]

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Rows:
        assert (name, config, split, streaming) == ("user/set", "en", "test", True)
        return Rows({"id": str(i), "body": f"text {i}"} for i in range(3))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    argv = ["data", "pack", "hf:user/set:en", "--split", "test", "--column", "body", "--out", "packed"]
    assert run(*argv) == 0
    assert "packed: 3 documents, 21 bytes" in capsys.readouterr().out
    assert Path("packed").read_bytes() == b"text 0\x1etext 1\x1etext 2\x1e"


def test_models_and_doctor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "--params", "50m") == 0
    shown = capsys.readouterr().out
    assert re.search(r"e1 .*1280 .*49.5M .*99M .*7.68K", shown)
    assert re.search(r"elman .*layers of matrix,e1 .*1280 .*49.8M .*161K", shown)
    assert run("models", "--params", "300") == 0
    assert "no width within 2%" in capsys.readouterr().out
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    assert "reference" in shown
    assert re.search(rf"elman +{re.escape(elman.__version__)}, ", shown)
    assert run("--version") == 0
    assert capsys.readouterr().out == f"elman {elman.__version__}\n"


def test_data_pack_and_info(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "pack", "text", "short", "--out", "packed") == 0
    assert "501 documents" in capsys.readouterr().out
    assert run("data", "info", "packed") == 0
    shown = capsys.readouterr().out
    assert re.search(r"documents +501\b", shown)
    assert "bits/byte" in shown


def test_generate_writes_raw_bytes_to_a_pipe(trained: Path) -> None:
    prompt = "é\x1e".encode()
    command = [sys.executable.encode(), b"-m", b"elman", b"generate", os.fsencode(trained), b"--prompt", prompt]
    finished = subprocess.run([*command, b"--bytes", b"64"], capture_output=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(prompt)
    assert len(finished.stdout) == len(prompt) + 64


def test_several_prompts_are_written_as_documents(trained: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    Path("prompt").write_bytes(b"\xff\xfe not UTF-8")
    prompts = ["--prompt", "def ", "--prompt", "", "--prompt-file", "prompt"]
    capfdbinary.readouterr()
    assert run("generate", trained, *prompts, "--bytes", 9, "--top-k", 5) == 0
    written = capfdbinary.readouterr().out
    for begin in (b"def ", b"", b"\xff\xfe not UTF-8"):
        assert written.startswith(begin)
        assert written[len(begin) + 9] == 0x1E
        written = written[len(begin) + 10 :]
    assert written == b""


def test_turns_are_read_line_by_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    capfdbinary.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"first\n\n\xff\n")))
    assert run("generate", trained, "--interactive", "--bytes", 8) == 0
    captured = capfdbinary.readouterr()
    assert captured.err == b""
    turns = captured.out.split(b"\x1e")
    assert len(turns) == 4
    assert turns[-1] == b""
    assert max(map(len, turns)) == 8


def test_a_terminal_is_asked_for_turns_until_the_end(trained: Path) -> None:
    """Ctrl-D ends, and so does Ctrl-C where nothing is being written."""
    command = [sys.executable, "-m", "elman", "generate", str(trained), "--interactive", "--bytes", "8"]
    for by_signal in (False, True):
        terminal, theirs = pty.openpty()
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            seen = b""
            for turn in (1, 2):
                while seen.count(b"> ") < turn or not seen.endswith(b"> "):
                    seen += os.read(terminal, 1000)
                if turn == 1:
                    os.write(terminal, b"hello\n")
            # Again and again: one that comes after the prompt is seen, but before it waits, may be lost. But not at
            # once: one that comes while Python ends would be its end.
            for _ in range(10):
                if by_signal:
                    process.send_signal(signal.SIGINT)
                else:
                    os.write(terminal, b"\x04")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                    break
            else:
                process.kill()
        os.close(terminal)
        assert process.returncode == 0
        assert b"Ctrl-D ends" in seen


def test_an_interrupt_ends_a_turn_and_not_the_conversation(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    capfdbinary.readouterr()
    write = Decoder.write

    def interrupted(decoder: Decoder) -> Iterator[list[bytes]]:
        for i, pieces in enumerate(write(decoder)):
            if i == 3:
                raise KeyboardInterrupt
            yield [b"x" for _ in pieces]

    monkeypatch.setattr(Decoder, "write", interrupted)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert run("generate", trained, "--interactive", "--bytes", 8) == 0
    assert capfdbinary.readouterr().out == b"xxx\x1exxx\x1e"


@pytest.mark.parametrize(
    "argv", [["generate", "trained", "--prompt", "abc"], ["eval", "trained", "--contexts", "0", "--device", "cpu"]]
)
def test_a_lack_of_memory_is_one_clear_line(
    argv: list[str], trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(*args: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(LanguageModel, "forward", forward)
    capsys.readouterr()
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"--b(ytes 500|atch-size 64).*: out of memory \(.*allocate.*\): give fewer", line), line


def test_a_closed_pipe_is_no_error(trained: Path) -> None:
    command = f"{sys.executable} -m elman generate {trained} --bytes 20000 | head -c 10 >&2; exit ${{PIPESTATUS[0]}}"
    finished = subprocess.run(["bash", "-c", command], capture_output=True)
    assert finished.returncode == 141
    assert len(finished.stderr) == 10


def test_the_command_line_starts_without_matplotlib_and_compilers() -> None:
    """Each takes a second or more: only what needs them may load them."""
    heavy = ("matplotlib", "torch._dynamo", "cuda.core")
    code = f"import sys, elman.cli; print(*(name for name in {heavy} if name in sys.modules))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []


def test_odd_names_are_shown_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "pack", "text", "--out", "o[/b] :smile:.txt") == 0
    assert run("data", "info", "o[/b] :smile:.txt") == 0
    assert run("train", "--data", "o[/b] :smile:.txt", "--steps", 1, *TINY, "--out", "r[/red]") == 0
    assert capsys.readouterr().out.count("o[/b] :smile:.txt") == 3


def test_a_reader_that_goes_away_does_not_end_a_run(folder: Path) -> None:
    options = " ".join(["--data text --steps 30 --eval-every 5", *TINY])
    command = f"{sys.executable} -m elman train {options} --out piped | head -1; exit ${{PIPESTATUS[0]}}"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert (folder / "piped" / "summary.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(trained: Path) -> None:
    command = f"{sys.executable} -m elman models > /dev/full"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert "No space left on device" in line


def test_the_terminal_shows_readable_text(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elman.writing import Request, generate

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    generate(Request(trained, ("caf\u00e9\x1b[2J",), num_bytes=50, device="cpu"), terminal)
    assert terminal.getvalue().startswith("café␛[2J")

"""Losses over long text against the same by one piece at a time; and ``elman eval`` as a user meets it."""

import copy
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from elman.cli import main
from elman.data.bytes import DELIMITER
from elman.data.vocabulary import BYTES, ByteVocabulary
from elman.evaluation import long_text
from elman.evaluation.long_text import Reader, carried_cost, carried_loss, context_cost, context_losses, context_rows
from elman.mixers import mixer_config
from elman.model import LanguageModel, ModelConfig, next_token_losses

TINY = ["--dim", "16", "--depth", "2", "--seq-len", "32", "--batch-size", "4", "--eval-bytes", "200", "--device", "cpu"]


def build(name: str = "e1") -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(16, 2, (mixer_config(name)(),)))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def text(size: int) -> np.ndarray:
    drawn = np.random.default_rng(0).integers(97, 110, size=size, dtype=np.uint8)
    drawn[np.random.default_rng(1).random(size) < 0.05] = DELIMITER
    drawn[[0, 40, 41]] = DELIMITER
    return drawn


@torch.inference_mode()
def losses(model: LanguageModel, tokens: np.ndarray, resets: bool) -> np.ndarray:
    """Of all but the first, in one piece from rest."""
    there = torch.from_numpy(tokens.astype(np.int64))[None]
    reset = torch.cat((torch.ones(1, 1, dtype=torch.bool), there[:, :-2] == DELIMITER), 1) if resets else None
    logits, _ = model(there[:, :-1], None, reset)
    return next_token_losses(logits, there[:, 1:])[0].double().numpy()


def before(tokens: np.ndarray) -> np.ndarray:
    """How many of its document come before each token but the first."""
    return np.array([len(tokens[:i].tobytes().rpartition(bytes([DELIMITER]))[2]) for i in range(1, len(tokens))])


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("streams", [1, 3])
def test_the_state_is_carried_through_all_of_the_text(
    resets: bool, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_text, "_CHUNK", 24)
    monkeypatch.setattr(long_text, "WARM_UP", 10)
    model, tokens = build(), text(100)
    expected = np.empty(99)
    part = -(-99 // streams)
    for first in range(0, 99, part):
        start = max(0, first - 10)
        # A stream that starts within a document is at rest there.
        expected[first : first + part] = losses(model, tokens[start : first + part + 1], resets)[first - start :]
    told: list[int] = []
    total, bins = carried_loss(Reader(model, BYTES, resets), tokens, told.append, streams)
    assert (total.tokens, total.bytes) == (99, 99)
    assert total.nats_per_byte == pytest.approx(expected.mean(), rel=1e-6)
    assert sum(told) == carried_cost(tokens, streams)
    places = before(tokens)
    assert sum(row.tokens for row in bins) == 99
    assert bins[0].last == 0
    for row in bins:
        inside = (row.first <= places) & (places <= row.last)
        assert row.tokens == inside.sum()
        assert row.nats_per_token == pytest.approx(expected[inside].mean(), rel=1e-6)


@pytest.mark.parametrize("name", ["e1", "transformer"])
@pytest.mark.parametrize("resets", [False, True])
def test_contexts_are_compared_on_the_same_tokens(name: str, resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "_CHUNK", 24)
    monkeypatch.setattr(long_text, "TARGETS", 5)
    monkeypatch.setattr(long_text, "_CONTEXT_TOKENS", 40)
    model, tokens, contexts = build(name), text(100), [1, 8, 60]
    assert context_rows(tokens, contexts, 1000) == 8
    told: list[int] = []
    found = context_losses(Reader(model, BYTES, resets), tokens, contexts, 3, told.append)
    assert sum(told) == context_cost(contexts, 3)
    firsts = np.linspace(60, 95, 3).astype(int)
    for row, context in zip(found, contexts, strict=True):
        each = [losses(model, tokens[first - context : first + 5], resets)[-5:] for first in firsts]
        assert (row.context, row.tokens) == (context, 15)
        assert row.nats_per_byte == pytest.approx(np.mean(each), rel=1e-6)
        assert row.standard_error == pytest.approx(np.std(np.mean(each, axis=1), ddof=1) / np.sqrt(3), rel=1e-4)


def test_what_scatters_is_the_loss_of_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of more bytes cost more; where each byte costs the same, the mean has no error."""

    class Pieces(ByteVocabulary):
        lengths = np.arange(256) % 7 + 1

    def read(self: Reader, tokens: np.ndarray, state: None, reset: np.ndarray) -> tuple[torch.Tensor, None]:
        return torch.from_numpy(0.5 * self.vocabulary.lengths[tokens[:, 1:]]), None

    monkeypatch.setattr(Reader, "read", read)
    (row,) = context_losses(Reader(build(), Pieces(), False), text(2000), [8], 4, lambda count: None)
    assert row.nats_per_byte == pytest.approx(0.5)
    assert row.standard_error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_gpu_reads_the_same(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model, tokens = LanguageModel(ModelConfig(64, 2, (mixer_config("e1")(),))).eval(), text(3000)
    there = Reader(copy.deepcopy(model).cuda(), BYTES, True, dtype)
    here = Reader(model, BYTES, True)
    close = {"rel": 1e-4 if dtype is None else 1e-2}
    total, bins = carried_loss(here, tokens, lambda read: None, 4)
    found, found_bins = carried_loss(there, tokens, lambda read: None, 4)
    assert found.nats_per_byte == pytest.approx(total.nats_per_byte, **close)
    assert [row.tokens for row in found_bins] == [row.tokens for row in bins]
    losses = [context_losses(reader, tokens, [64, 512], 4, lambda read: None) for reader in (here, there)]
    assert [row.nats_per_byte for row in losses[1]] == pytest.approx([row.nats_per_byte for row in losses[0]], **close)


def test_whose_state_can_be_carried() -> None:
    assert Reader(build(), BYTES, False).carries
    assert not Reader(build("transformer"), BYTES, False).carries


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("text").write_bytes(b"".join(b"line %d of a text\n\x1e" % i for i in range(500)))
    Path("short").write_bytes(b"too short")
    Path("empty").touch()
    assert main(["train", "--data", "text", "--out", "run", "--steps", "2", *TINY]) == 0
    capsys.readouterr()
    return tmp_path


def test_eval_leaves_numbers_tables_and_a_picture_and_overwrites_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
    for times in (1, 2):
        argv = ["eval", "run", "--data", "text", "--contexts", "64", "512", "65536", "--context-rows", "4"]
        assert main([*argv, "--max-bytes", "2k", "--device", "cpu"]) == 0
        shown = capsys.readouterr().out
        assert "context of 512" in shown
        assert "contexts of 65,536 bytes are left out: the text has 2,000" in shown
        made = sorted(Path("run").glob("eval-*"))
        assert len(made) == times
        assert {file.name for file in made[-1].iterdir()} == {"eval.json", "eval.md", "eval.png"}
    assert before == {file: file.read_bytes() for file in before}
    found = json.loads((made[-1] / "eval.json").read_text())
    assert found["carried"]["tokens"] == 1999
    assert found["windows"]["tokens"] == 62 * 32
    assert [row["context"] for row in found["contexts"]] == [64, 512]
    assert found["carried"]["bits_per_byte"] == pytest.approx(found["carried"]["nats_per_byte"] / np.log(2))
    report = (made[-1] / "eval.md").read_text()
    assert f"{found['carried']['bits_per_byte']:.4f} bits/byte" in report
    assert re.search(r"\| 16 to 31 \| \d+ \|", report)


def test_eval_reads_the_held_out_text_by_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "run", "--contexts", "0", "--mode", "windows", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    summary = json.loads(Path("run/summary.json").read_text())
    (made,) = Path("run").glob("eval-*")
    found = json.loads((made / "eval.json").read_text())
    assert found["data"]["bytes"] == 500
    assert len(found["data"]["sha256"]) == 64
    assert f"{found['windows']['nats_per_byte']:.4f} nats/byte" in shown
    assert found["windows"]["nats_per_token"] == pytest.approx(summary["heldout"]["nats_per_token"], abs=0.02)
    assert {file.name for file in made.iterdir()} == {"eval.json", "eval.md"}


def test_what_was_held_out_of_another_file_is_not_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", "run", "--contexts", "0", "--mode", "windows", "--device", "cpu"]
    text = Path("text").read_bytes()
    Path("text").write_bytes(text[: len(text) // 2])
    assert main(argv) == 2
    assert "is not the file that RUN run learned from" in capsys.readouterr().err
    assert not list(Path("run").glob("eval-*"))
    assert main([*argv, "--data", "text"]) == 0
    Path("text").write_bytes(text)
    assert main(argv) == 0
    config = json.loads(Path("run/config.json").read_text())
    config["train"]["data"] = None
    Path("run/config.json").write_text(json.dumps(config))
    assert main(argv) == 2
    assert "name one by --data" in capsys.readouterr().err


def test_the_checkpoint_that_was_read_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "text", "--out", "two", "--steps", "2", "--save-every", "1", *TINY]) == 0
    first, last = sorted(Path("two/checkpoints").iterdir())
    (last / "model.safetensors").write_bytes(b"")
    assert main(["eval", "two", "--data", "text", "--contexts", "0", "--mode", "windows", "--device", "cpu"]) == 0
    (made,) = Path("two").glob("eval-*")
    assert json.loads((made / "eval.json").read_text())["run"]["checkpoint"] == first.name


def test_contexts_come_in_order_and_once(folder: Path) -> None:
    argv = ["eval", "run", "--data", "text", "--mode", "windows", "--device", "cpu", "--contexts", "64", "16", "64"]
    assert main([*argv, "--max-bytes", "2k"]) == 0
    (made,) = Path("run").glob("eval-*")
    assert [row["context"] for row in json.loads((made / "eval.json").read_text())["contexts"]] == [16, 64]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "RUN nowhere: no such folder"),
        (["run", "--data", "nowhere"], "--data nowhere: no such file"),
        (["run", "--data", "empty"], "--data empty is empty"),
        (["run", "--data", "run"], "--data run is a folder"),
        (["run", "--data", "short"], "--data short has 9 bytes to read, fewer than a window of 33: .*--mode carried"),
        (["run", "--data", "text", "--max-bytes", "1", "--mode", "carried"], "--data text has 1 byte to read, and"),
        (["run", "--data", "text", "--max-bytes", "1"], "--data text has 1 byte to read, fewer than a window of 33"),
        (["run", "--max-bytes", "many"], "--max-bytes 'many' is no count"),
        (["run", "--contexts", "-5"], r"--contexts -5 is out of range: .*2\^30$"),
        (["run", "--contexts", "0", "64"], "--contexts 0 is out of range: .*; 0, for none, stands alone"),
        (["run", "--batch-size", "0"], "--batch-size 0 is out of range"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *argv, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.search(message, line), line
    assert not list(Path("run").glob("eval-*"))


def test_one_row_of_contexts_has_no_error(folder: Path) -> None:
    argv = ["eval", "run", "--data", "text", "--mode", "windows", "--contexts", "64", "--context-rows", "1"]
    assert main([*argv, "--max-bytes", "2k", "--device", "cpu"]) == 0
    (made,) = Path("run").glob("eval-*")
    text = (made / "eval.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["contexts"][0]["standard_error"] is None
    assert re.search(r"\| 64 \| [\d.]+ \| – \|", (made / "eval.md").read_text())
    assert (made / "eval.png").exists()


def test_a_growing_state_is_not_carried(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "transformer", "--data", "text", "--out", "grows", "--steps", "1", *TINY]) == 0
    capsys.readouterr()
    argv = ["eval", "grows", "--contexts", "16", "--context-rows", "2", "--device", "cpu"]
    assert main([*argv, "--mode", "carried"]) == 2
    assert "--mode carried: the state of transformer grows" in capsys.readouterr().err
    assert main(argv) == 0
    assert "is not carried through all of it" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_is_told_of_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").chmod(0o555)
    try:
        assert main(["eval", "run", "--device", "cpu"]) == 2
    finally:
        Path("run").chmod(0o755)
    assert "RUN run cannot be written to" in capsys.readouterr().err

import json
import sys
from pathlib import Path

import pytest

from elman.data.hub import hub_texts
from elman.data.pack import PackSummary, pack_texts
from elman.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of two splits, as ``datasets`` reads it from a folder."""
    datasets = pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub.constants")
    # Nothing is asked of the network, which would be tried again for long.
    for module in (datasets.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    rows = {
        "train": [{"text": "one\x1eé", "n": 1}, {"text": None, "n": 2}, {"text": "", "n": 3}, {"text": "two", "n": 4}],
        "test": [{"text": "three", "n": 5}],
    }
    for split, values in rows.items():
        (tmp_path / "set" / split).mkdir(parents=True)
        path = tmp_path / "set" / split / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
    return f"hf:{tmp_path / 'set'}"


def packed(source: str, out: Path, split: str = "train", column: str = "text", skip_bad: bool = True) -> PackSummary:
    summary = PackSummary()
    pack_texts(hub_texts(source, split, column, skip_bad, summary), out, summary)
    return summary


@pytest.mark.filterwarnings("ignore")
def test_rows_become_documents_in_their_order(folder: str, tmp_path: Path) -> None:
    summary = packed(folder, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == "one é\x1etwo\x1e".encode()
    assert (summary.documents, summary.bytes, summary.replaced) == (2, 11, 1)
    assert summary.skipped == {"rows without text": 1, "empty documents": 1}
    packed(folder, tmp_path / "test", split="test")
    assert (tmp_path / "test").read_bytes() == b"three\x1e"
    packed(f"{folder}:default", tmp_path / "config", split="test")
    assert (tmp_path / "config").read_bytes() == b"three\x1e"


@pytest.mark.filterwarnings("ignore")
def test_mistakes_are_named_and_leave_nothing(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"set, row 2, has no text in column 'text': give --column NAME.*--skip-bad"):
        packed(folder, out, skip_bad=False)
    with pytest.raises(UsageError, match=r"set, row 1, has no text in column 'n'"):
        packed(folder, out, column="n", skip_bad=False)
    with pytest.raises(UsageError, match=r"--column body is not in hf:.*: choose one of text, n"):
        packed(folder, out, column="body")
    with pytest.raises(UsageError, match=r"--split dev cannot be read \(.*\): check its name"):
        packed(folder, out, split="dev")
    with pytest.raises(UsageError, match=r"PATH hf:nobody/nothing --split train cannot be read \("):
        packed("hf:nobody/nothing", out)
    with pytest.raises(UsageError, match="PATH hf: names no data set: give hf:NAME"):
        packed("hf:", out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*partial"))


def test_a_missing_package_is_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"PATH hf:x needs the package datasets .*: pip install datasets"):
        hub_texts("hf:x", "train", "text", False, PackSummary())

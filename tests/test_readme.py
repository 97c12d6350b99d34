"""The README's Python runs as it stands there."""

import re
from pathlib import Path

from elman.cli import main
from elman.studies.find import find_study
from elman.studies.study import Scale

README = Path(__file__).parent.parent / "README.md"


def test_the_study_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(
        r"```python\n(from elman.studies import .*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "gates.py").write_text(block, encoding="utf-8")
    for scale in (Scale("full"), Scale("tiny")):
        study = find_study(str(tmp_path / "gates.py"), scale)
        assert [study.model(run).pattern for run in study.runs] == ["e1", "e1", "e1"]


def test_python_blocks_run(tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "text"
    text.write_bytes(b"import os\n\x1e" * 300)
    options = "--dim 16 --depth 2 --seq-len 32 --batch-size 4 --steps 2 --eval-bytes 100 --device cpu"
    assert main(["train", "--data", str(text), "--out", str(run), *options.split()]) == 0
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    # Of the others, one is tried above, and one wants transformers, by which tests/export tries what it does.
    blocks = [block for block in blocks if not block.startswith(("from elman.studies", "from transformers"))]
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(re.sub(r"runs/e1-[\d-]+", str(run), block), names)
    assert tuple(names["h"].shape) == (512, 16, 256)  # type: ignore[attr-defined]
    assert tuple(names["logits"].shape) == (1, 2, 256)  # type: ignore[attr-defined]

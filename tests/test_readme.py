"""The README's Python runs as it stands there."""

import re
from pathlib import Path

from elman.cli import main

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "text"
    text.write_bytes(b"import os\n\x1e" * 300)
    options = "--dim 16 --depth 2 --seq-len 32 --batch-size 4 --steps 2 --eval-bytes 100 --device cpu"
    assert main(["train", "--data", str(text), "--out", str(run), *options.split()]) == 0
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(re.sub(r"runs/e1-[\d-]+", str(run), block), names)
    assert tuple(names["h"].shape) == (512, 16, 256)  # type: ignore[attr-defined]
    assert tuple(names["logits"].shape) == (1, 2, 256)  # type: ignore[attr-defined]

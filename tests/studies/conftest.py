"""What tests of studies share."""

from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"".join(b"the quick brown fox %d\n\x1e" % i for i in range(800)))
    return path

"""``python -m elman.studies.child FILE``: calls the job that a launcher pickled there, and exits with its code."""

from __future__ import annotations

import pickle
import signal
import sys
from pathlib import Path
from types import FrameType


def main(request: Path) -> int:
    """Run the job. A signal before training has begun ends the process as an exception would."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    code: int = pickle.loads(request.read_bytes())()
    return code


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

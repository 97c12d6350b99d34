"""``python -m elman.studies.child``: calls the jobs that a launcher names on standard input, one after another.

Each is two lines, a file that the job is pickled in and one that its output is added to; its exit code is the line that
comes back. The process ends where its input does.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
from pathlib import Path
from types import FrameType


def main() -> int:
    """Run the jobs. A signal before training has begun ends the process as an exception would."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    # Whatever a job prints, and its own children, goes to its log: the pipe to the launcher is out of their sight.
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    while request := sys.stdin.readline().rstrip("\n"):
        log = os.open(sys.stdin.readline().rstrip("\n"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log, stream.fileno())
        os.close(log)
        code: int = pickle.loads(Path(request).read_bytes())()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        _forget()
        print(code, file=pipe)
    return 0


def _forget() -> None:
    """Leave the next job a device as the last one found it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

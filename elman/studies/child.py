"""``python -m elman.studies.child``: calls the jobs that a launcher names on standard input, one after another.

Each is two lines, a file that the job is pickled in and one that its output is added to. The line that comes back is
its exit code, and whether it left nothing behind, so that the process may take another. The process ends where its
input does.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
from pathlib import Path
from types import FrameType

#: What is said of a process that may take another job, and of one that may not.
CLEAN, USED = "clean", "used"
#: Bytes on the device that kernels keep for themselves; more would count in what the next run takes at its peak.
_MAY_STAY = 16 << 20


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
        print(code, CLEAN if _forget() else USED, file=pipe)
    return 0


def _forget() -> bool:
    """Leave the next job a device as the last one found it. Returns whether that could be done."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it holds the compiled model
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    left: int = torch.cuda.memory_allocated()
    return left <= _MAY_STAY


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

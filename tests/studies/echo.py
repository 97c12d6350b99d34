"""A job for launchers to run, in a module that imports nothing slow."""

import json
import os
import sys
import time
from pathlib import Path


class Echo:
    """A job that tells which GPU it was given, and writes when it ran."""

    def __init__(self, name: str, out: Path, code: int = 0, seconds: float = 0.0, dirty: bool = False) -> None:
        self.label = self.name = name
        self.out, self.code, self.seconds, self.dirty = out, code, seconds, dirty

    def __call__(self) -> int:
        started = time.time()
        if self.code < 0:
            os.kill(os.getpid(), -self.code)
        time.sleep(self.seconds)
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        (self.out / self.name).write_text(json.dumps([seen, started, time.time(), os.getpid()]))
        print(f"{self.name} saw {seen}\n")
        if self.dirty:
            # The process as it would judge itself with memory left on a GPU.
            sys.modules["__main__"]._forget = lambda: False  # type: ignore[attr-defined]
        return self.code

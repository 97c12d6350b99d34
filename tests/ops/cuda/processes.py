"""Processes that do the same at the same time."""

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import os, sys, traceback
{imports}

def child():
    if number := os.fork():
        return number
    try:
        exec({code!r})
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

children = [child() for _ in range({number})]
sys.exit(any([os.waitpid(number, 0)[1] for number in children]))
"""


def start_together(imports: str, code: str, number: int) -> "subprocess.Popen[bytes]":
    """A process that imports, and only then becomes ``number`` that run the code; its exit code is 0 if all did."""
    program = _PROGRAM.format(imports=imports, code=code, number=number)
    return subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3])

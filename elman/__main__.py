"""``python -m elman`` and the ``elman`` command."""

import sys


def run() -> int:
    """The command line, from its imports on: an interrupt while torch is being loaded is no traceback."""
    try:
        from elman.cli import main

        return main()
    except KeyboardInterrupt:
        print("elman: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())

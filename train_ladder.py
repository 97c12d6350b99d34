"""``python train_ladder.py ...`` is ``elman train ...``: the ladder's documented entry point."""

import sys

from elman.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

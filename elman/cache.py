"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Where elman keeps what it can make again, or None where nothing is kept.

    The environment variable ``ELMAN_CACHE`` names the folder; ``off`` disables it. Without it the folder is
    ``$XDG_CACHE_HOME/elman``, or ``~/.cache/elman``. A user without a home folder has none either. Its subfolder
    ``kernels`` holds compiled kernels, ``data`` the demo's text, ``variants`` those that --model has named as files.
    """
    setting = os.environ.get("ELMAN_CACHE", "")
    if setting == "off":
        return None
    try:
        if setting:
            return Path(setting).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "elman"
    except RuntimeError:  # no such user, or no home folder
        return None

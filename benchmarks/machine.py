"""What a measurement depends on, for the JSON files in results/."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import torch

from elman.environment import describe_environment


def machine(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The machine, its versions, the time, and the commit: the one given where the sources are no git checkout."""
    facts = describe_environment(device)
    del facts["command"]  # it names the machine's folders
    return {
        **facts,
        "git_commit": commit or facts["git_commit"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }

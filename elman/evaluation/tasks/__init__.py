"""Synthetic tasks, a file each, and the registry that names them.

To add one: write its file (generator, alphabet, chance level), then add its line to ``_REGISTRY``.
"""

from __future__ import annotations

import difflib
import functools
import importlib

from elman.errors import UsageError
from elman.evaluation.tasks.base import Examples, Task

__all__ = ["Examples", "Task", "find_task", "task_names"]

_REGISTRY = {
    "parity": "elman.evaluation.tasks.parity:Parity",
    **{f"mod_{m}": f"elman.evaluation.tasks.modular:Mod{m}" for m in (3, 5, 7)},
    "s3": "elman.evaluation.tasks.permutations:S3",
    "s5": "elman.evaluation.tasks.permutations:S5",
    "automaton": "elman.evaluation.tasks.automaton:Automaton",
    "dyck_1": "elman.evaluation.tasks.dyck:Dyck1",
    "dyck_2": "elman.evaluation.tasks.dyck:Dyck2",
    "anbncn": "elman.evaluation.tasks.anbncn:AnBnCn",
    "copying": "elman.evaluation.tasks.copying:Copying",
    "selective_copying": "elman.evaluation.tasks.selective_copying:SelectiveCopying",
    "induction_heads": "elman.evaluation.tasks.induction_heads:InductionHeads",
    "mqar": "elman.evaluation.tasks.mqar:MQAR",
    "listops": "elman.evaluation.tasks.listops:ListOps",
}


def task_names() -> list[str]:
    """Every registered task."""
    return list(_REGISTRY)


@functools.cache
def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        UsageError: there is none; the nearest are named.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=3, cutoff=0.5) or list(_REGISTRY)
        raise UsageError(f"TASK {name!r} is unknown: did you mean {' or '.join(near)}? `elman tasks` lists every task")
    module, _, attribute = _REGISTRY[name].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)()
    return task

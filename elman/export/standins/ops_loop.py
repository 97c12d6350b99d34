"""Kernels of our own are no part of an export."""

from typing import Any

NUMBERS: dict[Any, str] = {}


def why_not(problem: Any) -> str:
    """Nothing can be run by it."""
    return "an exported model has the reference alone: install elman for its kernels"


def status() -> tuple[bool, str]:
    """Not to be used."""
    return False, why_not(None)


def shipped_modules() -> list[Any]:
    """None."""
    return []

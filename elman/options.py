"""Checks that every config shares, on the command line and in Python alike."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elman.errors import UsageError

# Options that may be absent: their help tells what that means, so tyro need not say "None".
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalStr = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]

#: Above every sensible number, and exact in a float.
_LARGEST = 2**53


def flag(name: str) -> str:
    """A field's name as an option: ``seq_len`` -> ``--seq-len``."""
    return "--" + name.replace("_", "-")


def _flag_of(config: Any, name: str) -> str:
    """The option of a dataclass's field, by the name that ``tyro.conf.arg`` gives it where one does."""
    hint = typing.get_type_hints(type(config), include_extras=True).get(name)
    given = [found for extra in getattr(hint, "__metadata__", ()) if (found := getattr(extra, "name", None))]
    return flag(given[0] if given else name)


def check_choices(config: Any) -> None:
    """Every ``Literal`` field of a dataclass holds one of its values.

    Raises:
        UsageError: one does not; the option and its choices are named.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        choices = typing.get_args(hints[field.name])
        value = getattr(config, field.name)
        if typing.get_origin(hints[field.name]) is Literal and value not in choices:
            raise UsageError(f"{flag(field.name)} {value!r} is unknown: choose one of {', '.join(choices)}")


def check_at_least(config: Any, **least: float) -> None:
    """Every named field is None or a number from the bound up, and finite.

    Raises:
        UsageError: one is not; the option, its value and the bound are named.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not isinstance(value, int | float):
            raise UsageError(f"{_flag_of(config, name)} {value!r} is no number: give one of at least {bound}")
        if value is not None and not bound <= value <= _LARGEST:
            raise UsageError(f"{_flag_of(config, name)} {value} is out of range: give a number of at least {bound}")

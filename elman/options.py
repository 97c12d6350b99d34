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


#: What a field of each type takes, for people.
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def check_types(config: Any) -> None:
    """Every field of a dataclass holds a value of its type, and a ``Literal`` one of its values.

    A config.json that was edited, or a study's file, may hold any.

    Raises:
        UsageError: one does not; the option, its value and the choices, or what it takes, are named.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kind, value = hints[field.name], getattr(config, field.name)
        if _is_of(kind, value):
            continue
        option = _flag_of(config, field.name)
        if typing.get_origin(kind) is Literal:
            raise UsageError(f"{option} {value!r} is unknown: choose one of {', '.join(typing.get_args(kind))}")
        raise UsageError(f"{option} {value!r} is of the wrong type: give {_told(kind)}")


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value is of a field's type: a class of ``_KINDS``, a ``Literal``, a tuple of one type, or a union."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in parts
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(parts[0], each) for each in value)
    if parts:
        return any(_is_of(part, value) for part in parts)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _told(kind: Any) -> str:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"{_KINDS[parts[0]].removeprefix('a ')}s"
    # Every number is one, whole or not; and what may be absent need not be.
    parts = tuple(part for part in parts if part is not type(None) and not (part is int and float in parts))
    return " or ".join(_KINDS[part] for part in parts or (kind,))


def check_at_least(config: Any, **least: float) -> None:
    """Every named field is None or a number from the bound up, and finite.

    Raises:
        UsageError: one is not; the option, its value and the bound are named.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not bound <= value <= _LARGEST:
            most = f", and at most {_LARGEST}" if value > _LARGEST else ""
            raise UsageError(
                f"{_flag_of(config, name)} {value} is out of range: give a number of at least {bound}{most}"
            )

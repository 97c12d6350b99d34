"""Variants in files of their own outside this package: ``--model path/to/mgu.py``.

Such a file has one config class, as each file here has, and needs no line in the registry. It is run as any module is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from elman.errors import UsageError
from elman.mixers.base import MixerConfig


class NotThereError(UsageError):
    """The file at ``path`` is not there."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"--model {path} is not there: give the file of a variant, or a variant's name")
        self.path = path


_LOADED: dict[Path, type[MixerConfig]] = {}


def is_file(name: str) -> bool:
    """Whether ``--model`` names a file, not a variant."""
    return name.endswith(".py")


def own_config(name: str, taken: frozenset[str]) -> type[MixerConfig]:
    """The config class in a file, which is run once a process; ``file`` of it is the file's whole path.

    Args:
        name: the file's path.
        taken: names that others have.

    Raises:
        UsageError: there is no such file, it fails, or it has no config of a variant, several, or one whose name is no
            name or is taken.
    """
    path = Path(name).expanduser().resolve()
    if path not in _LOADED:
        config = _load(path)
        if not re.fullmatch(r"[a-z]\w*", config.name) or config.name in taken:
            why = "another variant has" if config.name in taken else "is no name"
            raise UsageError(
                f"--model {path}: {config.__name__}.name is {config.name!r}, which {why}: give it a name of its own, "
                f"of small letters, digits and _"
            )
        config.file = str(path)
        config.__reduce__ = _reduce  # type: ignore[assignment]
        _LOADED[path] = config
    return _LOADED[path]


def _reduce(config: MixerConfig) -> tuple[Any, ...]:
    """How it is pickled: another process knows no module of that name."""
    return _restore, (config.file, {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)})


def _restore(path: str, options: dict[str, Any]) -> MixerConfig:
    return own_config(path, frozenset())(**options)


def _load(path: Path) -> type[MixerConfig]:
    if not path.is_file():
        raise NotThereError(path)
    module_name = f"elman_variant_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise UsageError(f"--model {path} fails{where}: {type(error).__name__}: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, MixerConfig)
        and value.__module__ == module_name
        and not inspect.isabstract(value)
        and "name" in vars(value)
    ]
    if len(found) != 1:
        names = ", ".join(config.__name__ for config in found) or "none"
        raise UsageError(
            f"--model {path} must have one config class of a variant, with a name, but has {names}: see "
            f"docs/add_a_variant.md"
        )
    (config,) = found
    if "__dataclass_fields__" not in vars(config):  # its base's would have none of its options
        raise UsageError(f"--model {path}: {config.__name__} is no dataclass: write @dataclass(frozen=True) above it")
    return config

"""Variants in files of their own outside this package: ``--model path/to/mgu.py``.

Such a file has one config class, as each file here has, and needs no line in the registry. It is run as any module is,
and its text kept in the cache: a run that was trained by it is known by a hash of that text, and is opened by the very
text, wherever the file is by then and whatever is in it. What has never been named by ``--model`` on this machine is
not run: a run folder that somebody sent brings a copy of its code, to be read first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from elman.cache import cache_folder
from elman.errors import UsageError
from elman.mixers.base import MixerConfig

#: By the hash of their texts: what has been run in this process, and the texts.
_LOADED: dict[str, tuple[type[MixerConfig], bytes]] = {}


class UnknownCodeError(UsageError):
    """The text of this hash, of a variant of this name, has never been run here."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the code of the variant {name!r} has never been run here: name its file by --model first")
        self.name = name


def is_file(name: str) -> bool:
    """Whether ``--model`` names a file, not a variant."""
    return name.endswith(".py")


def own_config(name: str, taken: frozenset[str]) -> type[MixerConfig]:
    """The config class in a file that the user names. Its ``code`` is the hash of the file's text.

    Args:
        name: the file's path.
        taken: names that others have.

    Raises:
        UsageError: there is no such file, it fails, or it has no config of a variant, several, or one whose name is no
            name or is taken.
    """
    path = Path(os.path.expanduser(name))  # which, unlike Path's, takes a user that is not there for a name
    try:
        text = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"--model {path} cannot be read ({reason}): give the file of a variant, or a variant's name"
        ) from None
    code = _hash(text)
    if code not in _LOADED:
        config = _load(path.resolve(), text, code)
        if not re.fullmatch(r"[a-z]\w*", config.name) or config.name in taken:
            why = "another variant has" if config.name in taken else "is no name"
            raise UsageError(
                f"--model {path}: {config.__name__}.name is {config.name!r}, which {why}: give it a name of its own, "
                f"of small letters, digits and _"
            )
        _LOADED[code] = config, text
    _keep(code, text)
    return _LOADED[code][0]


def known_config(name: str, code: str) -> type[MixerConfig]:
    """The config class of a text that has been run here before.

    Raises:
        UnknownCodeError: it has not, or the cache was cleared since, or is off.
    """
    if code not in _LOADED:
        path = _place(code)
        text = path.read_bytes() if path is not None and path.is_file() else b""
        if path is None or _hash(text) != code:
            raise UnknownCodeError(name)
        _LOADED[code] = _load(path, text, code), text
    return _LOADED[code][0]


def text_of(config: MixerConfig) -> bytes:
    """Of the file that it came from, as that was run."""
    assert config.code is not None
    return _LOADED[config.code][1]


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:32]


def _place(code: str) -> Path | None:
    folder = cache_folder()
    # What a config.json says is no path.
    return None if folder is None or not re.fullmatch(r"[0-9a-f]{32}", code) else folder / "variants" / f"{code}.py"


def _keep(code: str, text: bytes) -> None:
    path = _place(code)
    if path is None or path.is_file():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{code}.{os.getpid()}.partial")
        partial.write_bytes(text)
        partial.replace(path)
    except OSError:
        pass  # it trains all the same; to open the run, its file is named again


def _reduce(config: MixerConfig) -> tuple[Any, ...]:
    """How it is pickled: another process knows no module of that name."""
    options = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    return _restore, (config.name, config.code, inspect.getfile(type(config)), options)


def _restore(name: str, code: str, file: str, options: dict[str, Any]) -> MixerConfig:
    try:
        config = known_config(name, code)
    except UnknownCodeError:
        config = own_config(file, frozenset())
        if config.code != code:
            raise
    return config(**options)


def _load(path: Path, text: bytes, code: str) -> type[MixerConfig]:
    """Run this very text, read at this path: Python's own import would take what a ``__pycache__`` there says it is."""
    module_name = f"elman_variant_{code}"
    module = types.ModuleType(module_name)
    module.__file__ = str(path)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        exec(compile(text, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
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
    config.code = code
    setattr(config, "__reduce__", _reduce)  # noqa: B010
    return config

"""Studies by name, from the catalogue that ships with elman, or from a user's own file."""

from __future__ import annotations

import difflib
import importlib.util
import pkgutil
import sys
import traceback
from pathlib import Path

from elman.errors import UsageError
from elman.studies import catalogue
from elman.studies.study import Scale, Study


def study_names() -> list[str]:
    """Those of the catalogue."""
    return sorted(module.name for module in pkgutil.iter_modules(catalogue.__path__))


def find_study(name: str, scale: Scale) -> Study:
    """The study of this name, or of this file, at a scale.

    Raises:
        UsageError: there is none, or its file is wrong: its line and what is wrong with it are told.
    """
    if name.endswith(".py") or "/" in name:
        return _load(Path(name), name, scale)
    names = study_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=2, cutoff=0.5) or names
        raise UsageError(
            f"STUDY {name!r} is unknown: did you mean {' or '.join(near)}? `elman study list` lists them; "
            f"your own is named by its file, such as my_study.py"
        )
    return _load(Path(*catalogue.__path__) / f"{name}.py", name, scale)


def _load(path: Path, name: str, scale: Scale) -> Study:
    if not path.is_file():
        raise UsageError(f"STUDY {name}: no such file; give a file, or a name that `elman study list` tells")
    spec = importlib.util.spec_from_file_location(f"elman_study_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses of a user's file look up their module.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "study", None)
        if not callable(make):
            raise UsageError("it has no function study(scale): write one that returns a Study")
        study = make(scale)
    except UsageError as error:
        raise UsageError(f"STUDY {name}: {error}") from None
    except Exception as error:
        raise UsageError(f"STUDY {name}{_line(path, error)}: {type(error).__name__}: {_first_line(error)}") from None
    if not isinstance(study, Study):
        raise UsageError(f"STUDY {name}: its study(scale) returns {type(study).__name__}: have it return a Study")
    return study


def _line(path: Path, error: Exception) -> str:
    """The line of the file that an error came from."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f", line {lines[-1]}" if lines else ""


def _first_line(error: Exception) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return (message.strip().splitlines() or ["no message"])[0]

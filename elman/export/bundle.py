"""The part of this package that a model needs, as one Python file that needs no elman: its plain PyTorch.

The sources are read from the package itself, those modules that the variant imports, and renamed, so that they disturb
no elman that is there too. What runs kernels of ours is left out: a few stand-ins (``standins/``) say that it is not
there, and so ``elman.ops`` takes its references.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import elman

_HERE = Path(__file__).parent
_PACKAGE = Path(elman.__file__).parent
#: The package itself and modules that run kernels, each with a file of ``standins/`` in its place.
_STANDINS = ("", "ops.cuda", "ops.cuda.compiler", "ops.cuda.launch", "ops.fused", "ops.loop", "ops.persistent")
#: Where sources name the package: imports, the registry of variants, and the ops that they register.
_NAMES = re.compile(
    r'(?<=\bfrom )elman\b|(?<=\bimport )elman\b|(?<=")elman(?=\.)|\belman(?=::)|(?<=torch\.ops\.)elman\b'
)


def bundle(modules: Iterable[str]) -> str:
    """The text of a Python file whose ``load()`` returns the package that holds these modules and what they import.

    Args:
        modules: names without the package's, such as ``model``.
    """
    sources = dict(sorted(_sources(modules).items()))
    digest = hashlib.sha256(repr(sources).encode()).hexdigest()[:12]
    name = f"elman_export_{digest}"
    entries = "\n".join(f"    {key!r}: (\n{_lines(text, name)}\n    )," for key, text in sources.items())
    loader = (_HERE / "files" / "loader.py").read_text(encoding="utf-8")
    for place, filling in (
        ('NAME = ""', f'NAME = "{name}"'),
        ("SOURCES: dict[str, str] = {}", f"SOURCES = {{\n{entries}\n}}"),
    ):
        assert place in loader
        loader = loader.replace(place, filling)
    return loader


def _lines(text: str, name: str) -> str:
    """A source as literals, one a line: what searches a file for imports by its lines finds none in them."""
    return "\n".join(f"        {line!r}" for line in _NAMES.sub(name, text).splitlines(keepends=True)) or "        ''"


def _sources(modules: Iterable[str]) -> dict[str, str]:
    """By name without the package's: the modules and all that they import of the package, at any place in them."""
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _path(name)
        found[name] = path.read_text(encoding="utf-8")
        parents = name.split(".")[:-1]
        waiting += [".".join(parents[:n]) for n in range(len(parents) + 1)]
        for node in ast.walk(ast.parse(found[name])):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += [other.removeprefix("elman.") for other in names if _is_module(other)]
    return found


def _is_module(name: str) -> bool:
    package, *parts = name.split(".")
    path = _PACKAGE.joinpath(*parts)
    if package != "elman" or not parts:
        return False
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _path(name: str) -> Path:
    if name in _STANDINS:
        return _HERE / "standins" / f"{name.replace('.', '_') or 'package'}.py"
    path = _PACKAGE.joinpath(*filter(None, name.split(".")))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

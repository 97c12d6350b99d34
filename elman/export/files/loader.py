"""Plain PyTorch code of elman, as it was when this folder was made by `elman export`: generated, not to be edited.

`load()` gives it as a package, without any file but this one.
"""

import contextlib
import importlib
import importlib.abc
import importlib.util
import sys
import types

NAME = ""
SOURCES: dict[str, str] = {}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def find_spec(self, fullname, path=None, target=None):
        if self._key(fullname) is None:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=self.is_package(fullname))

    def is_package(self, fullname):
        key = self._key(fullname)
        return not key or any(other.startswith(f"{key}.") for other in SOURCES)

    def get_source(self, fullname):
        return SOURCES[self._key(fullname)]

    def _key(self, fullname):
        package, _, key = fullname.partition(".")
        return key if package == NAME and key in SOURCES else None


@contextlib.contextmanager
def _without_command_line():
    """Options are declared for the command line too, by tyro, which has no part in a model."""
    try:
        import tyro  # noqa: F401
    except ImportError:
        conf = types.SimpleNamespace(arg=lambda **options: None)
        sys.modules["tyro"] = types.SimpleNamespace(conf=conf)
        try:
            yield
        finally:
            del sys.modules["tyro"]
    else:
        yield


def load():
    """The package."""
    if NAME not in sys.modules:
        sys.meta_path.append(_Finder())
        with _without_command_line():
            importlib.import_module(f"{NAME}.options")
    return importlib.import_module(NAME)

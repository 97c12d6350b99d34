"""Texts of a data set of the Hugging Face hub, or of a folder that its package ``datasets`` reads, row by row."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from elman.data.pack import PackSummary
from elman.errors import UsageError

PREFIX = "hf:"


def hub_texts(source: str, split: str, column: str, skip_bad: bool, summary: PackSummary) -> Iterator[str]:
    """The texts of ``hf:NAME[:CONFIG]`` in the order of its rows, streamed.

    Errors in opening it are raised at the call, those of a row when that row is read.

    Raises:
        UsageError: no package ``datasets``, no such data set, split or column, or, unless ``skip_bad``, a row has no
            text there.
    """
    name, _, config = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise UsageError(f"PATH {source} names no data set: give hf:NAME or hf:NAME:CONFIG")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(f"PATH {source} needs the package datasets ({error}): pip install datasets") from None
    with _named_errors(source, split):
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
    if column not in columns:
        raise UsageError(f"--column {column} is not in {source}: choose one of {', '.join(columns)}")
    return _texts(source, split, column, skip_bad, summary, rows)


def _texts(source: str, split: str, column: str, skip_bad: bool, summary: PackSummary, rows: Any) -> Iterator[str]:
    with _named_errors(source, split):
        for number, row in enumerate(rows.select_columns([column]), start=1):
            if isinstance(row[column], str):
                yield row[column]
            elif skip_bad:
                summary.skip("rows without text")
            else:
                raise UsageError(
                    f"{source}, row {number}, has no text in column {column!r}: give --column NAME, or leave such rows "
                    f"out by --skip-bad"
                )


@contextlib.contextmanager
def _named_errors(source: str, split: str) -> Iterator[None]:
    """Whatever goes wrong in the package becomes an error that names the data set."""
    try:
        yield
    except (UsageError, GeneratorExit):
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(
            f"PATH {source} --split {split} cannot be read ({reason}): check its name, its configuration and --split, "
            f"and the network"
        ) from None

"""The sources of the site: the pages of this folder, what they include, and what is made from the code.

    python -m docs.assemble build/docs        then Sphinx builds it (``make docs``)

No figure and no option is written by hand: tables of variants come from their configs, the command line's reference
from its ``--help``, and the README's figures from the README. A page asks for them by a comment on a line of its own:

    <!-- include: README.md -->               a file of the repository, as it is
    <!-- include: README.md#speed -->         what stands below one of its headings
    <!-- include: docs/examples/glu.py -->    code, in a fence
    <!-- made: variants -->                   what ``MADE`` makes

Links of what is included are turned to where their target is on the site; a file that has no page is put beside the
pages, to be downloaded. Only this module knows how, and it needs no generator, so that tests check the pages and their
links wherever they run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import docstring_parser

from docs.pictures import PICTURES, draw
from elman.cli import parse
from elman.commands import sized_variants
from elman.mixers import MixerConfig, mixer_config, mixer_names
from elman.options import flag
from elman.sizing import flops_per_token, num_params, size_model, state_size
from elman.units import format_count, parse_count

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs"
#: Sizes that the tables are made at; those of ``elman models``.
PARAMS, DEPTH, SEQ_LEN = "50m", 6, 512

_COMMAND = re.compile(r"^<!-- (include|made): (\S+) -->$", re.MULTILINE)
_HEADING = re.compile(r"^(#{1,6}) +(.*?) *$")
_FENCE = re.compile(r"^ *(`{3,}|~{3,})")
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
_CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")


class PageError(Exception):
    """A page asks for what is not there, or links to it."""


def lines_outside_code(text: str) -> Iterator[tuple[str, bool]]:
    """Every line, and whether it is prose: not in a fence, not the fence itself."""
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            yield line, False
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = ""
        else:
            fence = mark[1] if mark else ""
            yield line, not mark


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings."""
    return {slug(found[2]) for line, prose in lines_outside_code(text) if prose and (found := _HEADING.match(line))}


def section(text: str, anchor: str, level: int) -> str:
    """What stands below the heading with this anchor, the headings in it moved to below ``level``."""
    kept: list[str] = []
    depth = 0
    for line, prose in lines_outside_code(text):
        heading = _HEADING.match(line) if prose else None
        if heading and depth and len(heading[1]) <= depth:
            break
        if heading and depth:
            kept.append("#" * (len(heading[1]) - depth + level) + " " + heading[2])
        elif depth:
            kept.append(line)
        elif heading and slug(heading[2]) == anchor:
            depth = len(heading[1])
    if not depth:
        raise PageError(f"no heading has the anchor #{anchor}")
    return "\n".join(kept).strip("\n")


class Site:
    """Where everything of the repository is to be found on the site."""

    def __init__(self) -> None:
        #: The site's path of a page -> its text, as written or made.
        self.pages = {str(path.relative_to(PAGES)): path.read_text(encoding="utf-8") for path in _page_files()}
        self.pages |= {f"variants/{name}.md": variant_page(name) for name in mixer_names()}
        #: What is put beside the pages: the site's path -> the repository's.
        self.files: dict[str, Path] = {}
        #: (file, anchor or "") that a page includes -> that page.
        self._homes: dict[tuple[str, str], str] = {}
        for page, text in self.pages.items():
            for kind, what in _COMMAND.findall(text):
                if kind == "include":
                    file, _, anchor = what.partition("#")
                    self._homes[file, anchor] = page

    def page(self, name: str) -> str:
        """A page's Markdown, with what it asks for, its links turned."""
        text, level, parts, done = self.pages[name], 1, [], 0
        for found in _COMMAND.finditer(text):
            before = text[done : found.start()]
            for line, prose in lines_outside_code(before):
                if prose and (heading := _HEADING.match(line)):
                    level = len(heading[1])
            parts.append(self._turn(before, f"docs/{name}", name))
            parts.append(self._asked(found[1], found[2], level, name))
            done = found.end()
        parts.append(self._turn(text[done:], f"docs/{name}", name))
        return "".join(parts)

    def _asked(self, kind: str, what: str, level: int, page: str) -> str:
        if kind == "made":
            if what not in MADE:
                raise PageError(f"{page} asks for {what!r}: there is {', '.join(MADE)}")
            return self._turn(MADE[what](), f"docs/{page}", page)
        file, _, anchor = what.partition("#")
        if not (ROOT / file).is_file():
            raise PageError(f"{page} includes {file}, which is not there")
        text = (ROOT / file).read_text(encoding="utf-8")
        if file.endswith(".py"):
            return f"```python\n{text.rstrip()}\n```"
        try:
            return self._turn(section(text, anchor, level) if anchor else text.strip("\n"), file, page)
        except PageError as error:
            raise PageError(f"{page}: {file}: {error}") from None

    def _turn(self, text: str, source: str, page: str) -> str:
        """The links of a text that stands in ``source``, as they are on ``page``."""

        def turn(found: re.Match[str]) -> str:
            label, target = found[1], self._target(found[2], source, page)
            if target is None:
                return label[1:-1]
            return f"{label}({target})"

        def prose(line: str) -> str:
            spans = {m.span() for m in _CODE_SPAN.finditer(line)}
            return _LINK.sub(
                lambda m: m[0] if any(a <= m.start() and m.end() <= b for a, b in spans) else turn(m), line
            )

        return "\n".join(prose(line) if plain else line for line, plain in lines_outside_code(text))

    def _target(self, link: str, source: str, page: str) -> str | None:
        if re.match(r"[a-z]+:", link):
            return link
        path, _, anchor = link.partition("#")
        file = os.path.normpath(os.path.join(os.path.dirname(source), path)) if path else source
        if file in {f"docs/pictures/{name}.svg" for name in PICTURES}:
            there: tuple[str, str] | None = (file.removeprefix("docs/"), "")
        else:
            there = self._place(file, anchor)
        if there is None:
            if (ROOT / file).is_dir():
                return None  # a folder has no page; its name stays
            if not (ROOT / file).is_file():
                raise PageError(f"{source} links to {link}, which is not there")
            there = (file.removeprefix("docs/") if file.startswith("docs/") else f"files/{file}"), ""
            self.files[there[0]] = ROOT / file
        home, anchor = there
        relative = "" if home == page and anchor else os.path.relpath(home, os.path.dirname(page) or ".")
        return relative + (f"#{anchor}" if anchor else "")

    def _place(self, file: str, anchor: str) -> tuple[str, str] | None:
        """The page, and the anchor in it, of a heading of a file; None where the site has no such page."""
        own = file.removeprefix("docs/")
        if file.startswith("docs/") and own in self.pages:
            return own, anchor
        if (file, anchor) in self._homes:
            return self._homes[file, anchor], ""
        if (file, "") in self._homes:
            return self._homes[file, ""], anchor
        for (included, part), page in self._homes.items():
            if included == file and anchor in anchors(section((ROOT / file).read_text(encoding="utf-8"), part, 1)):
                return page, anchor
        if anchor and (ROOT / file).is_file() and anchor not in anchors((ROOT / file).read_text(encoding="utf-8")):
            raise PageError(f"{file} has no heading #{anchor}")
        return None


def _page_files() -> list[Path]:
    return sorted(path for path in PAGES.rglob("*.md") if "runs" not in path.relative_to(PAGES).parts)


def options_table(config: type[object]) -> str:
    """Name, choices, default and docstring of every option of a config or command, its own first."""
    texts: dict[str, str] = {}
    for kind in [each for each in config.__mro__ if dataclasses.is_dataclass(each)]:
        parsed = docstring_parser.parse_from_object(kind).params
        texts = {each.arg_name: " ".join((each.description or "").split()) for each in parsed} | texts
    order = {name: place for place, name in enumerate(dict.fromkeys(_declared(config)))}
    hints = typing.get_type_hints(config)
    rows = ["| option | default | |", "|---|---|---|"]
    for field in sorted(dataclasses.fields(config), key=lambda field: order[field.name]):  # type: ignore[arg-type]
        text, choices = texts[field.name], typing.get_args(hints[field.name])
        if typing.get_origin(hints[field.name]) is typing.Literal:
            text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        default = "" if field.default is None else f"`{field.default}`"
        rows.append(f"| `{flag(field.name)}` | {default} | {_cell(text)} |")
    return "\n".join(rows) if len(rows) > 2 else "None of its own."


def _declared(config: type[object]) -> Iterator[str]:
    for kind in config.__mro__:
        yield from vars(kind).get("__annotations__", ())


@functools.cache
def variant_page(name: str) -> str:
    """A variant: its module's docstring, its options, and what it counts at one size."""
    config = mixer_config(name)
    module = sys.modules[config.__module__]
    file = Path(inspect.getfile(config)).relative_to(ROOT)
    summary = docstring_parser.parse_from_object(config).short_description
    related = [kind for kind in config.__mro__[1:] if issubclass(kind, MixerConfig) and "name" in vars(kind)]
    lines = [f"# {name}", f"**`{config.equation}`**", inspect.cleandoc(module.__doc__ or "")]
    if related:
        lines.append(f"It builds on [{related[0].name}]({related[0].name}.md).")
    lines += ["## Options", f"`elman train --model {name} --help` shows them beside those of training."]
    lines += [options_table(config), f"## Counts at {PARAMS} parameters"]
    model = size_model((config(),), params=parse_count(PARAMS, "--params"), depth=DEPTH)
    lines.append(
        f"{summary}\n\nAt a depth of {DEPTH}, by formula: {model.dim} wide, {num_params(model):,} parameters, "
        f"{flops_per_token(model, SEQ_LEN):,} FLOPs a token forward, a state of {state_size(model, SEQ_LEN):,} numbers."
    )
    lines.append(f"Source: [{file}]({os.path.relpath(file, 'docs/variants')}).")
    return "\n\n".join(lines) + "\n"


def variants_table() -> str:
    """Every variant at one size."""
    rows = ["| variant | equation | width | parameters | FLOPs/token | state |", "|---|---|---|---|---|---|"]
    for name, equation, config in sized_variants(parse_count(PARAMS, "--params"), DEPTH):
        link = f"[{name}]({name}.md)" if name in mixer_names() else f"`{name}`"
        if config is None:
            rows.append(f"| {link} | {_cell(f'`{equation}`')} | | no width within 2% | | |")
            continue
        counts = (num_params(config), flops_per_token(config, SEQ_LEN), state_size(config, SEQ_LEN))
        numbers = " | ".join(format_count(count) for count in counts)
        rows.append(f"| {link} | {_cell(f'`{equation}`')} | {config.dim} | {numbers} |")
    names = "\n".join(["", "```{toctree}", ":hidden:", "", *mixer_names(), "```"])
    return "\n".join(rows) + "\n" + names


def command_help(*names: str) -> str:
    """What ``elman NAMES --help`` prints."""
    printed = io.StringIO()
    terminal = {"COLUMNS": "90", "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, terminal), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse([*names, "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue()).strip("\n")


def commands_below(*names: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """A command and all of its subcommands, with their help."""
    text = command_help(*names)
    yield names, text
    if re.search(r"^\W*subcommands\b", text, re.MULTILINE):
        found = re.search(r"\{([\w,-]+)\}", text)
        assert found is not None
        for name in found[1].split(","):
            yield from commands_below(*names, name)


def command_reference() -> str:
    """Every command's help."""
    parts = []
    for names, text in commands_below():
        parts += [f"## {' '.join(('elman', *names))}", f"```text\n{text}\n```"]
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


#: What a page may ask for by name.
MADE: dict[str, Callable[[], str]] = {
    "variants": variants_table,
    "commands": command_reference,
    "training-options": functools.partial(options_table, parse(["train", "--steps", "1"]).config.__class__),
}


def assemble(out: Path) -> Site:
    """Write the site's sources to ``out``, in place of what was there.

    Raises:
        PageError: a page includes or links to what is not there.
    """
    site = Site()
    shutil.rmtree(out, ignore_errors=True)
    texts = {name: site.page(name) for name in site.pages}
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    for name, path in site.files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)
    draw(out / "pictures")
    return site


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))

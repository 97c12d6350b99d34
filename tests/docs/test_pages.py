"""The site's pages without its generator: what they include and link to is there, what is made agrees with the code."""

import dataclasses
import io
import re
from importlib import util
from pathlib import Path

import pytest

from docs import assemble
from docs.assemble import PAGES, PageError, Site, section, slug
from elman.cli import parse
from elman.mixers import mixer_config, mixer_names
from elman.options import flag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "pages"
    assemble.assemble(out)
    return out


def test_every_page_is_in_the_navigation(folder: Path) -> None:
    listed = {"index.md"}
    for page in folder.rglob("*.md"):
        for tree in re.findall(
            r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            for entry in tree.split("\n"):
                if entry and not entry.startswith(":"):
                    name = re.sub(r".*<(.*)>", r"\1", entry)
                    listed.add(str((page.parent / f"{name}.md").relative_to(folder)))
    assert listed == {str(page.relative_to(folder)) for page in folder.rglob("*.md")}


def test_links_lead_to_pages_files_and_headings(folder: Path) -> None:
    checked = 0
    for page in folder.rglob("*.md"):
        for line, prose in assemble.lines_outside_code(page.read_text(encoding="utf-8")):
            for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`]*`", "", line)) if prose else ():
                if re.match(r"https?:", target):
                    continue
                path, _, anchor = target.partition("#")
                there = (page.parent / path).resolve() if path else page
                assert there.is_file(), (page, target)
                if anchor:
                    assert anchor in assemble.anchors(there.read_text(encoding="utf-8")), (page, target)
                checked += 1
    assert checked > 50


def test_nothing_is_fetched_from_the_network(folder: Path) -> None:
    for page in folder.rglob("*.md"):
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(script|link|img|iframe)\b", page.read_text(encoding="utf-8")), (
            page
        )


@pytest.mark.parametrize("name", mixer_names())
def test_a_variant_has_a_page_with_its_options(folder: Path, name: str) -> None:
    text = (folder / "variants" / f"{name}.md").read_text(encoding="utf-8")
    config = mixer_config(name)
    for field in dataclasses.fields(config):
        (row,) = re.findall(rf"^\| `{flag(field.name)}` \|(.*)", text, re.MULTILINE)
        assert len(row.split("|")[-2]) > 15, field.name  # its docstring
        assert field.default is None or f"`{field.default}`" in row
    assert config.equation in text


def test_the_command_line_reference_has_every_command() -> None:
    texts = dict(assemble.commands_below())
    assert {("train",), ("study", "run"), ("data", "pack")} <= set(texts)
    for field in dataclasses.fields(parse(["train", "--steps", "1"]).config):
        assert flag(field.name) in texts["train",]


def test_a_section_ends_at_the_next_heading_and_is_moved_below_the_page_s() -> None:
    text = "# A\na\n## B b!\nb\n```sh\n# no heading\n```\n### C\nc\n## D\nd"
    assert section(text, "b-b", 1) == "b\n```sh\n# no heading\n```\n## C\nc"
    assert slug("The `x`, and – y_z") == "the-x-and--y_z"
    with pytest.raises(PageError, match="no heading has the anchor #e"):
        section(text, "e", 1)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[x](nowhere.md)", "links to nowhere.md, which is not there"),
        ("[x](../README.md#nowhere)", "has no heading #nowhere"),
        ("<!-- include: nowhere -->", "includes nowhere, which is not there"),
        ("<!-- include: README.md#nowhere -->", "no heading has the anchor #nowhere"),
        ("<!-- made: nothing -->", "asks for 'nothing': there is variants"),
    ],
)
def test_what_is_not_there_is_an_error(text: str, complaint: str) -> None:
    site = Site()
    site.pages["bad.md"] = text
    with pytest.raises(PageError, match=complaint):
        site.page("bad.md")


def test_code_is_not_taken_for_links() -> None:
    site = Site()
    site.pages["code.md"] = "`[x](nowhere.md)`\n```\n[x](nowhere.md)\n```"
    assert site.page("code.md") == site.pages["code.md"]


@pytest.mark.skipif(util.find_spec("sphinx") is None, reason="Sphinx is not installed (make docs installs it)")
@pytest.mark.filterwarnings("ignore")  # of what Sphinx will drop, by its extensions
def test_the_site_builds_without_a_warning(folder: Path, tmp_path: Path) -> None:
    from sphinx.application import Sphinx

    warnings = io.StringIO()
    trees = tmp_path / "trees"
    app = Sphinx(folder, PAGES, tmp_path / "site", trees, "html", status=None, warning=warnings)
    app.build()
    assert warnings.getvalue() == ""
    built = {
        str(page.relative_to(tmp_path / "site").with_suffix(".md")) for page in (tmp_path / "site").rglob("*.html")
    }
    assert {str(page.relative_to(folder)) for page in folder.rglob("*.md")} <= built
    text = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=\"https?:", text)

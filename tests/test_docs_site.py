"""`make docs`: links are strict, nothing is loaded from elsewhere, the reference has every command and key."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer.main

from openvision.cli.main import app
from openvision.multimodal.recipe import VlmRecipe
from openvision.recipe.schema import Recipe, load_recipe
from openvision.recipe.view import values_of

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "docs/site/build.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, BUILD, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stderr
    return out


def test_every_page_is_made(site: Path) -> None:
    pages = {path.relative_to(site / "pages").with_suffix(".html") for path in (site / "pages").rglob("*.md")}
    assert {page for page in pages if not (site / "html" / page).is_file()} == set()
    assert Path("index.html") in pages
    assert Path("results/train_gpu.html") in pages


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|link|iframe)[^>]*?(?:src|href)=\"?(?:https?:)?//[^>]*>")
    for page in (site / "html").rglob("*.html"):
        assert loads.findall(page.read_text(encoding="utf-8")) == [], page


def test_markdown_left_nothing_raw(site: Path) -> None:
    """Lists and tables that Python-Markdown takes for text."""
    for page in (site / "html").rglob("*.html"):
        for paragraph in re.findall(r"<p>(.*?)</p>", page.read_text(encoding="utf-8"), re.DOTALL):
            assert not re.search(r"\n(?:- |\| |\d+\. )|```|<!-- (?:run|slow|needs)", paragraph), (
                f"{page.name}: {paragraph}"
            )


def test_every_command_and_option_is_listed(site: Path) -> None:
    text = (site / "pages/reference/cli.md").read_text(encoding="utf-8")

    def check(command: Any, words: str) -> None:
        if hasattr(command, "commands"):
            for name, below in command.commands.items():
                check(below, f"{words} {name}")
            return
        section = text.partition(f"## `{words}`\n")[2].partition("\n## ")[0]
        assert section, words
        for parameter in command.params:
            if not parameter.hidden and parameter.opts[0].startswith("-"):
                assert f"`{parameter.opts[0]}`" in section, f"{words} {parameter.opts[0]}"

    check(typer.main.get_command(app), "openvision")


def test_every_key_of_a_recipe_is_listed_with_its_meaning(site: Path) -> None:
    text = (site / "pages/reference/recipes.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    recipe = load_recipe(ROOT / "recipes/openvision/l14.toml")
    assert {key.split(".")[-1] for key in values_of(recipe)} <= keys
    tables = set(re.findall(r"^### `(?:vlm: )?\[+(\w+)\]+`", text, re.MULTILINE))
    assert {*Recipe.model_fields, *VlmRecipe.model_fields} <= keys | tables
    assert re.findall(r"^\| `\w+` .*\|\s+\|$", text, re.MULTILINE) == [], (
        "keys without a meaning: write a docstring below them"
    )


def test_python_has_every_public_name(site: Path) -> None:
    import openvision

    text = (site / "pages/reference/python.md").read_text(encoding="utf-8")
    assert [name for name in openvision.__all__ if f"## `openvision.{name}`\n" not in text] == []


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the site's scripts, whose modules import each other."""
    monkeypatch.syspath_prepend(BUILD.parent)
    return BUILD.parent


def test_drawings_are_those_of_their_script(scripts: Path) -> None:
    drawings: dict[str, str] = runpy.run_path(str(scripts / "drawings.py"))["drawings"]()
    assert drawings
    for name, svg in drawings.items():
        ElementTree.fromstring(svg)
        assert (ROOT / "docs/images" / name).read_text(encoding="utf-8") == svg, "run python docs/site/drawings.py"


def test_model_zoo_has_the_published_numbers(scripts: Path) -> None:
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    zoo = runpy.run_path(str(scripts / "zoo.py"))
    assert zoo["filled"](text) == text, "run python docs/site/zoo.py"
    for name, table in zoo["tables"]().items():
        assert f"<!-- table: {name} -->\n{table}\n" in text


def test_a_page_without_an_entry_ends_the_build(tmp_path: Path, scripts: Path) -> None:
    check_navigation = runpy.run_path(str(scripts / "build.py"))["check_navigation"]
    (tmp_path / "lost.md").write_text("# Lost\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"lost\.md"):
        check_navigation([{"Start": []}], tmp_path)
    with pytest.raises(SystemExit, match=r"gone\.md"):
        check_navigation([{"Start": ["lost.md", "gone.md"]}], tmp_path)
    check_navigation([{"Start": [{"Lost": "lost.md"}]}], tmp_path)

"""docs/architecture.md names what exists: every path, every dotted name, every folder, and what each may import."""

import importlib
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "openvision"
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
QUOTED = dict.fromkeys(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)))
PATHS = [word for word in QUOTED if re.fullmatch(r"[\w.]+/[\w./]*|\w+\.py", word)]
NAMES = [word for word in QUOTED if re.fullmatch(r"[a-z]\w*(\.\w+)+", word) and not word.endswith(".py")]
ROWS = [line.strip("| \n").split(" | ") for line in re.findall(r"^\| `[^\n]*\|$", TEXT, re.MULTILINE)]
TREE = {row[0].strip("`"): [cell.strip(" |") for cell in row[1:]] for row in ROWS}


def test_something_is_named():
    assert len(PATHS) > 40
    assert len(NAMES) > 40


@pytest.mark.parametrize("path", PATHS)
def test_path_exists(path):
    assert (PACKAGE / path).exists() or (ROOT / path).exists()


@pytest.mark.parametrize("name", NAMES)
def test_name_exists(name):
    """The longest part that is a module is imported; the rest are attributes."""
    words = name.removeprefix("openvision.").split(".")
    depth = max((i for i in range(len(words) + 1) if _is_module(words[:i])), default=0)
    found: object = importlib.import_module(".".join(["openvision", *words[:depth]]))
    for word in words[depth:]:
        assert hasattr(found, word), f"{name}: there is no {word}"
        found = getattr(found, word)


def _is_module(words: list[str]) -> bool:
    path = PACKAGE.joinpath(*words)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_every_folder_and_part_is_in_the_tree():
    folders = {path.parent for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    expected = {f"{folder.relative_to(PACKAGE).as_posix()}/" for folder in folders - {PACKAGE}}
    assert {path for path in TREE if path.endswith("/")} == expected


def test_imports_are_those_that_are_allowed():
    checked = runpy.run_path(str(ROOT / "tests/test_import_direction.py"))
    named = checked["COMMON"] | {"__init__"}
    for part, allowed in checked["ALLOWED"].items():
        if part in named:
            continue
        row = TREE.get(f"{part}/") or TREE.get(f"{part}.py")
        assert row is not None, f"docs/architecture.md has no row for {part}"
        told = row[1] if len(row) > 1 else ""
        everything = checked["ALLOWED"].keys() - named - {part}
        assert (everything if told == "everything" else set(filter(None, told.split(", ")))) == allowed, part

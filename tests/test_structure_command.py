"""`benchmarks/structure.py` counts what docs/decisions.md says it counts."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/structure.py"


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_circles(structure):
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set[str](), "e": {"f"}, "f": {"e"}}
    assert structure.circles(graph) == [{"b", "c"}, {"e", "f"}]
    assert structure.circles({"a": {"b"}, "b": set()}) == []


def test_model_checks(structure):
    source = "isinstance(x, OpenVision)\nisinstance(x, (int, VisionConfig))\nisinstance(x, str)\nOpenVision(x)\n"
    assert structure.model_checks(ast.parse(source)) == 2


def test_any_lines(structure):
    lines = ["from typing import Any", "def f(a: Any, b: dict[str, Any]) -> None:", "    'Any text.'", "    c: Any = a"]
    assert structure.any_lines(ast.parse("\n".join(lines))) == 2


def test_imports_anywhere_in_a_module(structure):
    source = "import a.b\ndef f():\n    from c import d\n"
    assert structure.imported(ast.parse(source)) == {"a.b", "c", "c.d"}


def test_update(structure, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"above\n{structure.BEGIN}old\n{structure.END}\nbelow\n")
    structure.update(document, "new\n")
    assert document.read_text() == f"above\n{structure.BEGIN}new\n{structure.END}\nbelow\n"
    document.write_text("no marks\n")
    with pytest.raises(SystemExit, match="has no"):
        structure.update(document, "new\n")

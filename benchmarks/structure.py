"""Measure how a checkout of this repository is laid out: the before and after of docs/decisions.md.

    python benchmarks/structure.py                                            # this checkout
    python benchmarks/structure.py ../before . --update docs/decisions.md     # two checkouts, before and after

Prints a Markdown table with one column per checkout; `--update` writes it between the marks of a document as well. All
but the route is read from the source; nothing is imported.

The route runs `openvision train` on the smoke form of recipes/quickstart.toml with each checkout's own package, under
this interpreter. It counts the package's files with a function that is called between `openvision.cli.main.main` and
the return of the first `step` of training/optimizer/adam.py: in total, and from the first batch on. Functions that run
while a module is imported are not counted.
"""

import argparse
import ast
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path("recipes/quickstart.toml")
BEGIN, END = "<!-- structure -->\n", "<!-- /structure -->"
MODEL_CLASSES = {
    *("OpenVision", "OpenVision2", "VisionTransformer", "TextTransformer"),
    *("ParallelCaptionDecoder", "AutoregressiveCaptionDecoder"),
    *("OpenVisionConfig", "OpenVision2Config", "VisionConfig", "TextConfig"),
    *("DecoderConfig", "AutoregressiveDecoderConfig"),
}

# Run in a process of its own, since a profile function sees everything that the interpreter calls.
TRACER = """
import sys, threading
package, arguments = sys.argv[1], sys.argv[2:]
from openvision.cli.main import main
everything, step, importing = set(), set(), {}
state = {"batch": False, "open": True}

def note(frame, event, argument):
    code, thread = frame.f_code, threading.get_ident()
    if event not in ("call", "return") or not state["open"]:
        return
    if code.co_name == "<module>":
        importing[thread] = importing.get(thread, 0) + (1 if event == "call" else -1)
    if importing.get(thread, 0) or not code.co_filename.startswith(package):
        return
    file = code.co_filename[len(package) + 1:]
    if event == "call":
        if file == "data/loader.py" and code.co_name == "__next__" and not state["batch"]:
            state["batch"] = True
            if frame.f_back.f_code.co_filename.startswith(package):
                step.add(frame.f_back.f_code.co_filename[len(package) + 1:])
        everything.add(file)
        # Other threads read batches, which may begin before the first is asked for.
        if state["batch"] or threading.current_thread() is not threading.main_thread():
            step.add(file)
    elif file == "training/optimizer/adam.py" and code.co_name == "step":
        state["open"] = False
        sys.setprofile(None)

sys.argv = ["openvision", *arguments]
threading.setprofile(note)
sys.setprofile(note)
try:
    main()
except SystemExit:
    pass
assert state["batch"] and not state["open"], "no update was seen"
print("everything", *sorted(everything))
print("step", *sorted(step))
"""


def parse(path: Path) -> ast.Module:
    """Syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path, package: Path) -> str:
    """Dotted name of a source file."""
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module) -> set[str]:
    """Names that a module imports anywhere in it: of modules, and of what may be a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def circles(graph: dict[str, set[str]]) -> list[frozenset[str]]:
    """Sets of modules that import each other in a ring."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, todo = set[str](), [start]
        while todo:
            new = graph[todo.pop()] - found
            found |= new
            todo += new
        reached[start] = found
    rings = {frozenset(other for other in found if start in reached[other]) for start, found in reached.items()}
    return sorted((ring for ring in rings if ring), key=sorted)


def model_checks(tree: ast.Module) -> int:
    """Calls `isinstance(x, C)` where C names a class of a model or of its shape."""
    return sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and any(isinstance(part, ast.Name) and part.id in MODEL_CLASSES for part in ast.walk(node.args[1]))
        for node in ast.walk(tree)
    )


def any_lines(tree: ast.Module) -> int:
    """Lines that use `Any`; an import does not."""
    return len({node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "Any"})


def widest(package: Path) -> tuple[int, str]:
    """Most entries of a folder, and its name; the top, which is a map, and `cli`, a file per command, are left out."""
    folders = {path.parent for path in package.rglob("*.py")} - {package, package / "cli"}
    return max((len(list(_entries(folder))), str(folder.relative_to(package))) for folder in folders)


def _entries(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__"))


def route(checkout: Path) -> dict[str, list[str]]:
    """Files between `openvision train` and the first update: of "everything", and of the "step"."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> str:
        # From the checkout, which `python -m` and `-c` put first on the path.
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(arguments[:3])} failed in {checkout}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    with tempfile.TemporaryDirectory() as folder:
        smoke, run = Path(folder, "smoke"), Path(folder, "run")
        # Draws the data and writes the resolved recipe, so that the route below is that of any recipe.
        python("-m", "openvision.cli.main", "train", str(RECIPE), "--smoke", "--run", str(smoke))
        recipe = ["train", str(smoke / "recipe.toml"), "--data", str(smoke / "smoke-data"), "--run", str(run)]
        printed = python("-c", TRACER, str(checkout / "openvision"), *recipe).splitlines()
    words = [line.split() for line in printed]
    return {line[0]: line[1:] for line in words if line and line[0] in ("everything", "step")}


def measure(checkout: Path, show_route: bool) -> dict[str, str]:
    """The rows of the table for one checkout."""
    package = checkout / "openvision"
    paths = sorted(package.rglob("*.py"))
    trees = {path: parse(path) for path in paths}
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    modules = [length for path, length in lengths.items() if path.name != "__init__.py"]
    names = {module_name(path, package): path for path in paths}
    graph = {name: (imported(trees[path]) & names.keys()) - {name} for name, path in names.items()}
    entries, folder = widest(package)
    files = route(checkout)
    if show_route:
        for part, listed in files.items():
            print(f"{checkout}: {part}: {' '.join(listed)}", file=sys.stderr)
    return {
        "modules, `__init__.py` not counted": f"{len(modules)}",
        "median lines of a module": f"{statistics.median(modules):.0f}",
        "largest folder, entries": f"{entries} (`{folder}`)",
        "lines of Python in `openvision/`": f"{sum(lengths.values()):,}",
        "modules that `training/trainer.py` imports": f"{len(graph['openvision.training.trainer'])}",
        "`isinstance` on model classes": f"{sum(map(model_checks, trees.values()))}",
        "lines with `Any`": f"{sum(map(any_lines, trees.values()))}",
        "circles of imports": f"{len(circles(graph))}",
        "files from `openvision train` to the first update": f"{len(files['everything'])}",
        "files from the first batch to the update": f"{len(files['step'])}",
        "of these in `training/`": f"{sum(file.startswith('training/') for file in files['step'])}",
    }


def table(columns: dict[str, dict[str, str]]) -> str:
    """Markdown: a column per checkout, under its name."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    first = next(iter(columns.values()))
    lines += [f"| {row} | {' | '.join(column[row] for column in columns.values())} |" for row in first]
    return "\n".join(lines) + "\n"


def update(document: Path, written: str) -> None:
    """Replace what stands between the marks in a document."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        sys.exit(f"{document} has no {BEGIN.strip()} with a {END} below it")
    document.write_text(before + BEGIN + written + END + after, encoding="utf-8")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT], help="folders with an openvision/ package")
    parser.add_argument("--update", type=Path, help="document to write the table into")
    parser.add_argument("--route", action="store_true", help="list the files of the route on standard error")
    options = parser.parse_args()
    folders = [folder.resolve() for folder in options.checkouts]
    names = ["before", "after"] if len(folders) == 2 else [folder.name for folder in folders]
    written = table({name: measure(folder, options.route) for name, folder in zip(names, folders, strict=True)})
    print(written, end="")
    if options.update:
        update(options.update, written)


if __name__ == "__main__":
    main()

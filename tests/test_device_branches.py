"""Every place that asks for the kind of a device is in the table of docs/decisions.md, and no other is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "openvision"
ASKS = re.compile(
    "|".join(
        (
            r"""\.type\s*[!=]=\s*["'](cuda|cpu|mps)["']""",
            r"\bis_cuda\b",
            r"(cuda|mps)\.is_available\(\)",
            r"""\bdevice\s*[!=]=\s*["'](cuda|cpu|mps)["']""",
            # Backends of torch.distributed stand for devices.
            r"get_backend\(",
        )
    )
)


def places() -> Iterator[str]:
    """Dotted names of the functions whose own lines ask, or of the module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        owners = dict.fromkeys(range(1, len(lines) + 1), module)
        _own(ast.parse(text), module, owners)
        for number, line in enumerate(lines, start=1):
            if ASKS.search(line):
                yield owners[number]


def _own(node: ast.AST, name: str, owners: dict[int, str]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            own = f"{name}.{child.name}"
            owners |= dict.fromkeys(range(child.lineno, (child.end_lineno or child.lineno) + 1), own)
            _own(child, own, owners)
        else:
            _own(child, name, owners)


def test_every_branch_on_the_kind_of_device_is_listed():
    text = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    section = text.partition("## Branches on the kind of device")[2].partition("\n## ")[0]
    listed = {
        name
        for row in section.splitlines()
        if row.startswith("|")
        for name in re.findall(r"`([\w.]+)`", row.split("|")[1])
    }
    assert listed == set(places())


def launches(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[str, bool]]:
    """Kernels that Triton launches, `kernel[grid](...)`, and whether under the device of a tensor."""
    for child in ast.iter_child_nodes(tree):
        inside = guarded or (
            isinstance(child, ast.With)
            and any("cuda.device_of(" in ast.unparse(item.context_expr) for item in child.items)
        )
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Subscript):
            yield ast.unparse(child.func.value), inside
        yield from launches(child, inside)


def test_every_kernel_is_launched_on_the_device_of_its_tensors():
    """Triton takes the current device: a model on another one would be read from the wrong one, or not at all."""
    modules = list(PACKAGE.rglob("triton_*.py"))
    found = [launch for path in modules for launch in launches(ast.parse(path.read_text(encoding="utf-8")))]
    assert len(found) == 5
    assert [kernel for kernel, guarded in found if not guarded] == []

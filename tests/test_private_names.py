"""Private names of torch that the package uses exist; docs/decisions.md lists them and says why."""

import ast
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint._state_dict_stager  # Neither is loaded by torch itself.
import torch.distributed.distributed_c10d

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"`torch\.((?:\w+\.)*_[a-z]\w*)`")
_, _, section = (ROOT / "docs/decisions.md").read_text().partition("\n## Private names of torch\n")
LISTED = sorted(set(NAME.findall(section.partition("\n## ")[0])))


def private_names(path: Path) -> set[str]:
    """Names below torch with a part that begins with "_", however the module calls what it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = dict(_aliases(tree))
    for node in ast.walk(tree):
        # `_aten = torch.ops.aten` is one more name for a part of torch.
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Attribute)
            and (name := _dotted(node.value, known))
        ):
            known |= {target.id: name for target in node.targets if isinstance(target, ast.Name)}
    found = {name for node in ast.walk(tree) if isinstance(node, ast.Attribute) and (name := _dotted(node, known))}
    private = {
        match[0] for name in {*known.values(), *found} if (match := re.match(r"torch\.(?:\w+\.)*?_[a-z]\w*", name))
    }
    return {name.removeprefix("torch.") for name in private}


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names that imports bind to torch and what is in it, with the full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield (alias.asname, alias.name) if alias.asname else ("torch", "torch")
                    yield alias.name, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _dotted(node: ast.expr, known: dict[str, str]) -> str | None:
    """Full name of `a.b.c` if `a` is torch or comes from it."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value, known)):
        return f"{owner}.{node.attr}"
    return None


@pytest.mark.parametrize("name", LISTED)
def test_exists(name):
    assert attrgetter(name)(torch) is not None


def test_aliases_are_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import torch\nimport torch.distributed as dist\nfrom torch import cpu\nfrom torch.nn import _reduction\n"
        "_aten = torch.ops.aten\n_aten._one.default\ndist.c10d._two(torch._three)\ncpu._four()\nself._five\n"
    )
    assert private_names(path) == {
        "ops.aten._one", "distributed.c10d._two", "_three", "cpu._four", "nn._reduction"
    }  # fmt: skip


def test_the_list_is_what_is_in_use():
    used = set[str]().union(*map(private_names, (ROOT / "openvision").rglob("*.py")))
    assert used
    assert used == set(LISTED)

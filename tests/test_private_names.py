"""Private names of torch that the package uses exist; docs/decisions.md lists them and says why."""

import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import torch.distributed.tensor  # Loaded late by torch, and in the list.

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"\btorch\.((?:\w+\.)*_[a-z]\w*)")
_, _, section = (ROOT / "docs/decisions.md").read_text().partition("\n## Private names of torch\n")
LISTED = sorted(set(NAME.findall(section.partition("\n## ")[0])))


@pytest.mark.parametrize("name", LISTED)
def test_exists(name):
    assert attrgetter(name)(torch) is not None


def test_every_private_name_in_use_is_listed():
    used = {name for path in (ROOT / "openvision").rglob("*.py") for name in NAME.findall(path.read_text())}
    assert used
    assert used <= set(LISTED)

"""The tables of docs/scaling.md are what the planner says today."""

import re
from pathlib import Path

import pytest

from openvision.hardware import DEVICES
from openvision.planning.memory import Setting, state_bytes
from openvision.planning.plan import Plan, make_plan
from openvision.planning.stage import Assumptions
from openvision.planning.units import count, number, span
from openvision.recipe.schema import load_recipe

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]
COSTS = [row for row in ROWS if len(row) == 8]
MEMORY = [row for row in ROWS if len(row) == 6]
WORK = [row for row in ROWS if len(row) == 4]


def plan(recipe: str, device: str, devices: int) -> Plan:
    which = DEVICES[device]
    loaded = load_recipe(ROOT / f"recipes/{recipe.strip('`')}.toml")
    return make_plan(loaded, Assumptions(which, devices, which.mfu, which.price))


def test_all_tables_are_found():
    assert (len(COSTS), len(MEMORY), len(WORK)) == (15, 10, 4)


@pytest.mark.parametrize("row", COSTS, ids=lambda row: " ".join(row[:3]))
def test_costs(row):
    recipe, device, devices, *cells, layout = row
    made = plan(recipe, device, int(devices))
    cost, chosen = made.cost, made.stages[0].chosen
    assert cells == [span(value) for value in (cost.hours, cost.device_hours, cost.kilowatt_hours, cost.dollars)]
    assert chosen
    mode = "fsdp" if chosen.setting.sharding == "sharded" else "ddp"
    parts = "/".join(str(stage.chosen.parts) for stage in made.stages if stage.chosen)
    assert layout == f"{chosen.setting.checkpointing}, {mode}, {parts}"


@pytest.mark.parametrize("row", MEMORY, ids=lambda row: row[0])
def test_memory(row):
    made = plan(row[0], "h100", 64)
    assert row[1] == count(made.parameters.total)
    for cell, setting in zip(row[2:4], (Setting(devices=64), Setting(devices=64, sharding="sharded")), strict=True):
        assert cell == f"{sum(state_bytes(made.parameters, setting).values()) / 2**30:.1f}"
    for cell, stage in zip(row[4:], made.stages, strict=False):
        kept = [fit.per_sample for fit in stage.fits[::2]]
        assert cell == ", ".join(span((low / 2**20, high / 2**20)) for low, high in kept)


@pytest.mark.parametrize("row", WORK, ids=lambda row: row[0])
def test_work(row):
    stages = plan(row[0], "h100", 64).stages
    for cell, stage in zip(row[1:], stages, strict=True):
        resolution = re.search(r" \((\d+) px\)", cell)
        assert (int(resolution[1]) if resolution else 224) == stage.stage.resolution
        assert cell.split(" ")[0] == number(stage.forward / 1e9)

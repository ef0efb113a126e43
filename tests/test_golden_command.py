"""`make golden`: its recipes are valid, its tables of new names work, and a difference is one. `make golden` itself
takes minutes and is run by hand."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from openvision.cli.main import app

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/golden_losses.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("golden_losses", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_losses"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(script, monkeypatch):
    """Commands of this package run in this process: a dozen of their own would take seconds each."""

    def run(package: Path, arguments: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
        assert package == ROOT
        assert arguments[: len(script.CLI)] == script.CLI
        done = CliRunner().invoke(app, arguments[len(script.CLI) :])
        assert done.exit_code == 0 or not check
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    monkeypatch.setattr(script, "_python", run)


def test_commands_run_with_the_package_that_is_given(script, tmp_path):
    (tmp_path / "openvision.py").write_text("print('older')")
    assert script._python(tmp_path, ["-c", "import openvision"]).stdout == "older\n"
    with pytest.raises(SystemExit, match=r"(?s)golden: .* -c import nothing ended with 1\n.*No module named 'nothing'"):
        script._python(tmp_path, ["-c", "import nothing"])


@pytest.mark.usefixtures("here")
def test_the_recipe_of_every_case_is_valid(script, tmp_path):
    paths = []
    for name, case in script.CASES.items():
        paths.append(tmp_path / f"{name}.toml")
        script.write_recipe(case, ROOT, paths[-1])
    done = CliRunner().invoke(app, ["recipe", "validate", *map(str, paths)])
    assert done.exit_code == 0, done.output


def test_a_case_changes_what_it_says(script):
    recipe = script.recipe_of(script.CASES["caching"])
    assert [stage["accumulate"] for stage in recipe["stages"]] == [4, 4, 4]
    assert recipe["model"]["vision"]["width"] == 96
    assert "validation" not in recipe["data"]
    assert "accumulate" not in script.recipe_of(script.CASES["openvision"])["stages"][0]
    assert script.recipe_of(script.CASES["fsdp"])["parallel"] == {"mode": "fsdp"}


@pytest.mark.usefixtures("here")
def test_a_key_has_the_name_that_the_package_knows(script, tmp_path, monkeypatch):
    """As if four keys had had other names in the past, one of them in a table of another name, and one were renamed
    in the future."""
    case = script.Case("clip", {"stages.*.once": 0.1, "seed": None, "seme": 7, "pace.warm": 0.5, "pace.ema": 0.9})
    renamed = {"stages.once": "stages.drop_path", "seme": "seed", "pace": "optimizer", "name": "title"}
    monkeypatch.setattr(script, "RENAMED_KEYS", {**renamed, "optimizer.warm": "optimizer.weight_decay"})
    script.write_recipe(case, ROOT, tmp_path / "recipe.toml")
    recipe = tomllib.loads((tmp_path / "recipe.toml").read_text())
    assert recipe["optimizer"] == {"weight_decay": 0.5, "ema": 0.9}
    assert [stage["drop_path"] for stage in recipe["stages"]] == [0.1, 0.1]
    assert (recipe["name"], recipe["seed"]) == ("golden-clip", 7)
    assert not {"seme", "pace", "once"} & {*recipe, *recipe["stages"][0]}


def trained(script, lines: list[dict], values: list[float], folder: Path):
    folder.mkdir()
    save_file({"a": np.array(values, np.float32)}, folder / script.WEIGHTS, {"format": "pt"})
    return script.log("".join(json.dumps(line) + "\n" for line in lines)), script.weights(folder)


def test_the_first_difference_is_named(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "RENAMED_METRICS", {})

    def line(step: int, **numbers: float) -> dict:
        return {"kind": "train", "step": step, "seconds": float(step), "loss": 0.5, **numbers}

    lines = [line(1), line(2, temperature=14.0)]
    before = trained(script, lines, [1.0, 2.0], tmp_path / "before")

    def found(name: str, lines: list[dict], values: list[float]) -> str | None:
        return script.difference(before, trained(script, lines, values, tmp_path / name))

    slower = line(2, temperature=14.0, seconds=9.0, added=1.0)
    assert found("same", [line(1), slower], [1.0, 2.0]) is None
    off = line(1, loss=float(np.nextafter(0.5, 1)))
    assert found("loss", [off, slower], [1.0, 2.0]) == "step 1: loss of train is 0.5000000000000001, was 0.5"
    assert found("weight", lines, [1.0, 2.0000002]) == "after the last step: the weight a differs"
    assert found("shorter", lines[:1], [1.0, 2.0]) == "the log has 1 lines, had 2"
    other = [line(1), line(2, logit_scale=14.0)]
    assert "step 2: temperature is missing" in str(found("renamed", other, [1.0, 2.0]))
    monkeypatch.setattr(script, "RENAMED_METRICS", {"temperature": "logit_scale"})
    assert found("told", other, [1.0, 2.0]) is None


def test_cases_are_chosen_by_name(script):
    assert list(script.selected("fsdp,bf16")) == ["fsdp", "bf16"]
    assert script.selected(None) == script.CASES
    with pytest.raises(SystemExit, match="no case is named fspd"):
        script.selected("fspd")

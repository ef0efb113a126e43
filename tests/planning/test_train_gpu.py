"""benchmarks/train_gpu.py in its smoke form: the project's own step on shrunken models, on a CPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/train_gpu.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_gpu", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _matmul():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def rows_of(script, recipe: str, checkpointing: str = "none", sweep: bool = False) -> list[dict]:
    return script.measure(script.Case(recipe, 84, (2, 4), checkpointing, False, 1, "cpu", True, "high", sweep))


def test_both_versions_step_and_are_compared(script):
    rows = rows_of(script, "openvision/l14", sweep=True) + rows_of(script, "openvision2/l14", "selective", True)
    assert [row["batch"] for row in rows] == [2, 4, 2, 4]
    assert all(row["images_per_second"] > 0 and row["peak_gib"] > 0 for row in rows)
    # No peak is known for a CPU's MFU.
    assert all(row["mfu"] is None for row in rows)
    lines = script.table(rows).splitlines()[2:]
    assert lines[0].startswith("| openvision/l14 | 28 | none |")
    assert all(line.endswith("x openvision/l14 |") for line in lines[2:])
    json.dumps(rows)


def test_the_contrastive_part_has_no_decoder_and_one_text(script):
    recipe = script.recipe_of(script.Case("clip", 224, smoke=True))
    assert recipe.model.decoder is None
    assert recipe.loss.texts == ("alt",)
    (row,) = rows_of(script, "clip")
    rival = {**row, "recipe": "open_clip", "images_per_second": row["images_per_second"] / 2}
    assert "2.00x open_clip" in script.table([row, rival])


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["blocks", "one graph"])
def test_a_step_changes_the_parameters(script, whole):
    case = script.Case("openvision/l14", 84, (2,), "none", False, 1, "cpu", True, whole=whole)
    recipe = script.recipe_of(case)
    model, step = script.build_step(recipe, case, torch.device("cpu"))
    before = model.vision.head.weight.detach().clone()
    step(script.random_batch(recipe, 2, 28, torch.device("cpu")))
    assert not torch.equal(before, model.vision.head.weight)


def test_captions_have_sixty_tokens_on_average(script):
    recipe = script.load_recipe(script.RECIPES / "openvision2/l14.toml")
    batch = script.random_batch(recipe, 41, 28, torch.device("cpu"))
    assert batch.label_mask.sum(1).float().mean() == 60
    assert batch.alt_ids.shape == (41, 0)


@pytest.mark.slow
def test_the_loader_fed_run(script, monkeypatch):
    # Data and training are processes of their own, with a thread each.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (row,) = script.measure(script.Case("loader", 224, (2,), device="cpu", smoke=True))
    assert row["images_per_second"] > 0
    assert 0 <= row["data_wait"] < 1
    # Pauses of a CPU are nobody's.
    assert row["idle"] is None
    assert "| loader | 28 |" in script.table([row])

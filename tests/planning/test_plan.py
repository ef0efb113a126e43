"""Plans of all recipes, and of cases whose answer is known."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from openvision.errors import OpenVisionError
from openvision.hardware import DEVICES, GIB
from openvision.models.flops import training_flops
from openvision.planning.beside import additions_of
from openvision.planning.numbers import plan_numbers
from openvision.planning.plan import Plan, make_plan, texts_of
from openvision.planning.stage import Assumptions
from openvision.recipe.schema import Recipe, load_recipe, parse_recipe
from tests.conftest import TINY_RECIPE

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.toml") if path.parent.name != "vlm")
L14 = ROOT / "recipes/openvision/l14.toml"


def plan(
    recipe: Recipe | Path, devices: int = 8, device: str = "h100", overrides: tuple[str, ...] = (), **more
) -> Plan:
    """With the device's own ranges unless said."""
    loaded = load_recipe(recipe, list(overrides)) if isinstance(recipe, Path) else recipe
    which = DEVICES[device]
    return make_plan(loaded, Assumptions(which, devices, more.pop("mfu", which.mfu), which.price, **more))


@pytest.fixture
def tiny() -> Recipe:
    return parse_recipe(copy.deepcopy(TINY_RECIPE), "tiny")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_can_be_planned(path):
    made = plan(path, devices=64)
    assert made.cost.hours[0] < made.cost.hours[1]
    # Logit scales and bias belong to no tower.
    model, loss = made.recipe.model, made.recipe.loss
    additions = additions_of(made.recipe)
    numbers = 0 if model.text is None else 1 + sum(loss.model_options.values())
    assert made.parameters.total == sum(made.parameters.towers.values()) + numbers
    for stage in made.stages:
        tokens = made.assumptions.caption_tokens
        resolution = stage.stage.resolution
        frozen = made.recipe.frozen_towers
        own = training_flops(made.recipe.model, resolution, texts_of(made.recipe), tokens, frozen=frozen)
        assert stage.training == own + sum(part.training for part in additions.flops(resolution))
        assert stage.chosen is None or stage.local_batch == stage.chosen.micro_batch * stage.chosen.parts
        for fit in stage.fits:
            assert fit.peak[0] < fit.peak[1]
            assert fit.hopeful >= fit.micro_batch
    json.dumps(plan_numbers(made))


def test_l14_costs_what_its_papers_say():
    made = plan(L14)
    at_224 = made.stages[1]
    # OpenVision 2, table 3: 271.75 GFLOP an image at 224 px, unit and captions not stated.
    assert at_224.forward / 1e9 == pytest.approx(271.75, rel=0.03)
    so400m = plan(ROOT / "recipes/openvision/so400m14.toml").stages[2]
    assert so400m.stage.resolution == 384
    assert so400m.forward / 1e9 == pytest.approx(1636.75, rel=0.03)
    second = plan(ROOT / "recipes/openvision2/l14.toml").stages[1]
    assert second.forward / 1e9 == pytest.approx(208.90, rel=0.06)


def test_hours_are_flops_over_what_devices_deliver():
    made = plan(L14, devices=8, mfu=(0.4, 0.4))
    ideal = made.flops / (8 * 989e12 * 0.4) / 3600
    longest = max(stage.chosen.stretch.factor for stage in made.stages if stage.chosen)
    assert ideal < made.cost.hours[0] < 1.05 * longest * ideal
    # Half the utilisation takes twice the time of forward and backward.
    slow = plan(L14, devices=8, mfu=(0.2, 0.4))
    assert slow.cost.hours[1] == pytest.approx(2 * slow.cost.hours[0], rel=0.05)
    assert slow.stages[0].mfu[0] <= 0.2


def test_eight_times_the_devices_hardly_cost_more():
    few, many = plan(L14, devices=8), plan(L14, devices=64)
    assert few.cost.hours[0] / many.cost.hours[0] > 6
    assert many.flops == few.flops


def test_the_whole_run_has_one_layout_and_overrides_name_it():
    made = plan(L14, devices=8)
    layouts = {
        (stage.chosen.setting.checkpointing, stage.chosen.setting.sharding) for stage in made.stages if stage.chosen
    }
    assert len(layouts) == 1
    followed = load_recipe(L14, list(made.overrides))
    again = plan(followed, devices=8)
    assert again.overrides == ()
    assert not any("layout" in warning for warning in again.warnings)


def test_what_surely_fits_is_within_memory_and_one_more_chunk_is_not_needed():
    for stage in plan(L14, devices=8).stages:
        for fit in stage.fits:
            if fit.micro_batch:
                assert fit.peak[1] <= 79 * GIB


@pytest.mark.parametrize(
    ("overrides", "devices", "device", "part"),
    [
        ((), 100, "h100", "does not divide by 100 devices"),
        (("run.precision=float32",), 8, "h100", "float32"),
        ((), 4096, "h100", "matrix products of"),
        ((), 512, "h100", "update and communication"),
        ((), 1, "cpu", "years"),
        ((), 8, "4090", "layout in the recipe"),
    ],
)
def test_warnings(overrides, devices, device, part):
    assert any(part in warning for warning in plan(L14, devices, device, overrides).warnings)


def test_data_bound():
    made = plan(ROOT / "recipes/openvision/ti16.toml", devices=8)
    assert any("bound by data" in warning for warning in made.warnings)


def test_nothing_fits():
    small = replace(DEVICES["h100"], memory=4 * GIB)
    made = make_plan(load_recipe(ROOT / "recipes/openvision/h14.toml"), Assumptions(small, 1, (0.4, 0.4), (1, 1)))
    assert made.overrides == ()
    assert all(stage.chosen is None for stage in made.stages)
    assert any("does not fit" in warning for warning in made.warnings)


def test_the_quickstart_on_a_cpu_needs_no_warning():
    made = plan(ROOT / "recipes/quickstart.toml", devices=1, device="cpu", dataset_samples=16)
    assert made.warnings == ()
    # Measured on two cores: 616 s (docs/scaling.md).
    assert made.cost.hours[0] < 616 / 3600 < made.cost.hours[1]
    assert made.overrides == ()
    assert made.dataset_terabytes[0] == pytest.approx(16 * 30e3 / 1e12)
    assert not made.stages[0].fits[0].setting.gpu


def test_float32_keeps_twice_the_activations(tiny):
    half, full = (
        plan(tiny.model_copy(update={"run": tiny.run.model_copy(update={"precision": precision})}))
        for precision in ("bfloat16", "float32")
    )
    assert full.stages[0].fits[0].per_sample[0] > 1.5 * half.stages[0].fits[0].per_sample[0]


def test_assumptions_are_ranges():
    for mfu in ((0.0, 0.4), (0.5, 0.4), (0.4, 1.2)):
        with pytest.raises(OpenVisionError, match="mfu"):
            Assumptions(DEVICES["h100"], 1, mfu, (1, 2))

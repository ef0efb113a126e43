"""The recipes that come along: shapes, schedules and losses are those of the papers."""

from pathlib import Path

import pytest
import torch

from openvision.models.openvision import OpenVisionConfig
from openvision.models.openvision2 import OpenVision2Config, build_model
from openvision.models.variants import released_variants, variant, variant2
from openvision.recipe.schema import Recipe, load_recipe
from openvision.recipe.smoke import DEPTH, is_cut, smoke_recipe
from openvision.recipe.text import remarks
from openvision.recipe.view import check_recipe
from openvision.weights.registry import available_models, released

RECIPES = Path(__file__).parents[2] / "recipes"
V1 = {
    "ti16": ("tiny", 16),
    "ti8": ("tiny", 8),
    "s16": ("small", 16),
    "s8": ("small", 8),
    "b16": ("base", 16),
    "b8": ("base", 8),
    "l14": ("large", 14),
    "so400m14": ("so400m", 14),
    "h14": ("huge", 14),
}
V2 = {"l14": "large", "so400m14": "so400m", "h14": "huge", "g14": "giant"}
ALL = sorted(
    [
        *RECIPES.glob("*.toml"),
        *(
            path
            for folder in ("openvision", "openvision2", "openvision3", "clips", "distill", "beyond")
            for path in (RECIPES / folder).glob("*.toml")
        ),
    ]
)
# Resolution -> updates, warm-up updates, batch, peak learning rate (spec section 5).
STAGES = [(390_981, 1563, 32_768, 1.024e-3), (62_556, 1563, 16_384, 2.56e-5), (31_278, 0, 8_192, 3.2e-6)]


def schedule(recipe: Recipe) -> list[tuple[int, int, int, float]]:
    return [
        (stage.steps, stage.warmup_steps, stage.batch_size, round(stage.peak_learning_rate, 10))
        for stage in recipe.stages
    ]


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_validates_and_builds(path):
    assert "parameters" in check_recipe(path)


def test_the_recipes_are_there():
    assert {path.stem for path in (RECIPES / "openvision").glob("*.toml")} == set(V1)
    assert {path.stem for path in (RECIPES / "openvision2").glob("*.toml")} == set(V2)
    assert {path.stem for path in (RECIPES / "clips").glob("*.toml")} == {"l14", "h14"}


@pytest.mark.parametrize("name", V1)
def test_version_1(name, golden_folder):
    recipe = load_recipe(RECIPES / "openvision" / f"{name}.toml")
    size, patch = V1[name]
    resolutions = [stage.resolution for stage in recipe.stages]
    assert recipe.model == variant(size, patch, resolutions[-1])
    assert schedule(recipe) == STAGES
    published = {f"openvision-vit-{size}-patch{patch}-{resolution}" for resolution in resolutions}
    missing = published - set(released_variants())
    assert missing == ({"openvision-vit-huge-patch14-336"} if name == "h14" else set())
    assert (recipe.loss.contrastive, recipe.loss.caption, recipe.loss.texts) == (1, 2, ("alt", "sentence"))
    with torch.device("meta"):
        model = build_model(recipe.model)
    rows = [line.split("\t") for line in (golden_folder / "parameter_counts.tsv").read_text().splitlines()]
    counts = next(row for row in rows if row[0] == f"openvision-vit-{size}-patch{patch}-{resolutions[0]}")
    assert sum(p.numel() for p in model.vision.parameters()) == int(counts[4])
    assert model.text is not None
    assert sum(p.numel() for p in model.text.parameters()) == int(counts[2])


@pytest.mark.parametrize("name", V2)
def test_version_2(name):
    recipe = load_recipe(RECIPES / "openvision2" / f"{name}.toml")
    resolutions = [stage.resolution for stage in recipe.stages]
    assert recipe.model == variant2(V2[name], 14, resolutions[-1])
    assert isinstance(recipe.model, OpenVision2Config)
    assert recipe.model.keep_ratio == 0.35
    assert schedule(recipe) == (STAGES + STAGES[2:])[: len(resolutions)]
    assert (recipe.loss.contrastive, recipe.loss.caption, recipe.loss.texts) == (0, 2, ())
    released_at = [r for r in available_models() if r.startswith(f"openvision2-vit-{V2[name]}-")]
    assert {released(r).vision.image_size for r in released_at} <= set(resolutions)
    assert any(remark.place == "model.decoder.image_attention" for remark in remarks_of(f"openvision2/{name}"))


@pytest.mark.parametrize("name", ["l14", "h14"])
def test_clips_ends_with_512_and_128_million_samples(name):
    recipe = load_recipe(RECIPES / "clips" / f"{name}.toml")
    assert [stage.samples for stage in recipe.stages[1:]] == [512_000_000, 128_000_000]
    assert recipe.model == load_recipe(RECIPES / "openvision" / f"{name}.toml").model


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_smoke_form_keeps_what_the_recipe_is_about(path):
    recipe = load_recipe(path)
    smoke = smoke_recipe(recipe)
    assert smoke == smoke_recipe(recipe), "a pure function"
    assert [stage.resolution for stage in smoke.stages] == [stage.resolution for stage in recipe.stages]
    same = smoke.loss.model_copy(update={"reconstruction": recipe.loss.reconstruction})
    assert (same, smoke.augment, smoke.optimizer) == (recipe.loss, recipe.augment, recipe.optimizer)
    for name in ("vision", "text", "decoder", "reconstruction"):
        ours, theirs = getattr(smoke.model, name, None), getattr(recipe.model, name, None)
        if theirs is None:
            assert ours is None
            continue
        assert ours is not None
        assert ours.width == theirs.width
        if hasattr(theirs, "depth"):
            assert ours.depth == (DEPTH if is_cut(recipe.model) else theirs.depth)
    assert isinstance(smoke.model, OpenVision2Config) == isinstance(recipe.model, OpenVision2Config)
    assert smoke.steps == 1 + len(recipe.stages)
    assert smoke.start is None


def test_small_models_keep_their_depth_and_others_do_not():
    cut = {name: is_cut(load_recipe(RECIPES / "openvision" / f"{name}.toml").model) for name in V1}
    assert {name for name, shallow in cut.items() if not shallow} == {"ti16", "s16"}


def test_a_value_without_a_remark_is_published():
    """Every recipe with stages of its own says which of its values are not from a source."""
    assert [r.place for r in remarks_of("openvision/l14")] == ["data.order", "data.block", "data.reject_budget"]
    assert "stages.2" in {r.place for r in remarks_of("openvision/h14")}
    assert {"stages.3.batch_size", "run.precision"} <= {r.place for r in remarks_of("openvision2/h14")}
    assert "model.decoder" in {r.place for r in remarks_of("openvision2/g14")}


def remarks_of(name: str):
    return remarks((RECIPES / f"{name}.toml").read_text())


def test_plain_clip_is_openvision_without_what_openvision_adds():
    clip = load_recipe(RECIPES / "clip.toml")
    assert isinstance(clip.model, OpenVisionConfig)
    assert clip.model.decoder is None
    assert clip.stages == load_recipe(RECIPES / "openvision" / "b16.toml").stages

"""Recipes are complete, round-trip, and say what is wrong with them."""

from pathlib import Path

import pytest

from openvision.errors import OpenVisionError
from openvision.recipe.schema import dump_recipe, load_recipe, parse_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
# Folders of recipes for training encoders; multimodal models have recipes of another form.
FOLDERS = (RECIPES, *(RECIPES / name for name in ("openvision", "openvision2", "clips")))


@pytest.mark.parametrize("path", sorted(path for folder in FOLDERS for path in folder.glob("*.toml")), ids=str)
def test_every_recipe_is_valid_and_survives_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "resolved.toml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_misspelt_key_is_named_with_the_nearest():
    with pytest.raises(OpenVisionError, match=r"unknown key stages\.0\.bach_size \(did you mean batch_size\?\)"):
        load_recipe(RECIPES / "quickstart.toml", ["stages.0.bach_size=3"])
    with pytest.raises(OpenVisionError, match=r"unknown key model\.vision\.widht.*did you mean width"):
        load_recipe(RECIPES / "quickstart.toml", ["model.vision.widht=3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.samples=10", "do not fill one batch"),
        ("stages.1.resolution=4", r"stages\.1\.resolution 4 is smaller than a patch"),
        ("data.vocab_size=100000", r"data\.vocab_size 100000 exceeds the model's vocab_size"),
        ("loss.caption=0", "loss.caption must be above 0"),
        ("stages=[]", "stages: it has 0, and must have at least 1 entry"),
        ("data.tokenizer=x", "either vocab_size"),
        ("stages.7.samples=1", "has no key stages.7.samples"),
        ("nonsense", "is not of the form key=value"),
        ('loss.texts=["sentence"]', "texts must be"),
        ("stages.0.base_learning_rate=-1", r"stages\.0\.base_learning_rate: it is -1, and must be above 0"),
    ],
)
def test_one_clear_sentence_for_a_bad_value(override, message):
    with pytest.raises(OpenVisionError, match=message):
        load_recipe(RECIPES / "quickstart.toml", [override])


V2 = RECIPES / "openvision2" / "l14.toml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kind=openvision4", r"model\.kind is 'openvision4'; choose one of openvision, openvision2"),
        ("model.kepp_ratio=0.5", r"unknown key model\.kepp_ratio \(did you mean keep_ratio\?\)"),
        ("model.decoder.text_position=none2", r"unknown key model\.decoder\.text_position \(did you mean"),
        (
            "model.decoder.image_attention=full",
            r"model\.decoder\.image_attention: it is .*, and must be 'prefix' or 'causal'",
        ),
        ("model.keep_ratio=0", r"model: keep_ratio must be above 0"),
        ("loss.contrastive=1", r"of kind openvision2 has no text tower"),
        ('loss.texts=["alt"]', r"of kind openvision2 has no text tower"),
        ("loss.caption=0", r"loss\.caption must be above 0"),
        ("stages.1.micro_batches=3", r"stages\.1: batch_size 16384 is not divisible by micro_batches 3"),
        ("stages.0.resolution=13", r"stages\.0\.resolution 13 is smaller than a patch of 14 pixels"),
    ],
)
def test_one_clear_sentence_for_version_2(override, message):
    with pytest.raises(OpenVisionError, match=message):
        load_recipe(V2, [override])


def test_version_1_needs_a_text():
    with pytest.raises(OpenVisionError, match=r"loss\.texts \[\] is for models that only caption"):
        load_recipe(RECIPES / "quickstart.toml", ["loss.texts=[]"])


def test_overrides_reach_every_level():
    recipe = load_recipe(RECIPES / "quickstart.toml", ["seed=7", "stages.1.batch_size=64", "run.precision=float32"])
    assert recipe.seed == 7
    assert recipe.stages[1].batch_size == 64
    assert recipe.run.precision == "float32"


def test_the_decoder_can_be_left_out():
    recipe = load_recipe(RECIPES / "quickstart.toml", ["model.decoder=none", "loss.caption=0", 'loss.texts=["alt"]'])
    assert recipe.model.decoder is None
    assert recipe.caption_length is None


def test_missing_file_and_broken_toml(tmp_path):
    with pytest.raises(OpenVisionError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(OpenVisionError, match="not valid TOML"):
        load_recipe(broken)


def test_missing_key():
    with pytest.raises(OpenVisionError, match="key stages is missing"):
        parse_recipe({"name": "x", "model": {}, "data": {"train": "t", "vocab_size": 10}}, "here")


def test_outside_a_checkout_the_package_brings_recipes(tmp_path, monkeypatch):
    from openvision.recipe import schema

    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpenVisionError, match=r"recipe recipes/clip\.toml does not exist"):
        load_recipe(Path("recipes/clip.toml"))
    monkeypatch.setattr(schema, "_SHIPPED", RECIPES)
    assert load_recipe(Path("recipes/clip.toml")) == load_recipe(RECIPES / "clip.toml")
    # Only names inside the folder of recipes, and a file that is there goes first.
    with pytest.raises(OpenVisionError, match="does not exist"):
        load_recipe(Path("clip.toml"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/clip.toml").write_text("nonsense")
    with pytest.raises(OpenVisionError, match="not valid TOML"):
        load_recipe(Path("recipes/clip.toml"))

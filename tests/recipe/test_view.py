"""What `openvision recipe` shows: resolved values with their remarks, differences, and what is wrong."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.recipe.schema import load_recipe
from openvision.recipe.text import places, remarks
from openvision.recipe.view import check_recipe, diff_recipes, show_recipe
from openvision.text.tokenizer import Tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
H14 = RECIPES / "openvision" / "h14.toml"


def test_places_number_the_tables_of_an_array():
    text = "a = 1\n[t.u]\nb = 2 # [x]\n\n[[s]]  # why\nc = 3\n[[s]]\nc = 4\n"
    assert [place for place, _ in places(text)] == ["a", "t.u", "t.u.b", "", "s.0", "s.0.c", "s.1", "s.1.c"]


def test_remarks_of_values_and_tables():
    text = (
        "[run]\nprecision = 1  # published: float32; ours: fast\n[[stages]]  # not published; ours: H has two\n"
        "samples = 3  # a comment\nx = 2  # not published\n"
    )
    assert [(remark.place, remark.text) for remark in remarks(text)] == [
        ("run.precision", "published: float32; ours: fast"),
        ("stages.0", "not published; ours: H has two"),
    ]


def test_what_is_shown_is_the_recipe_again_with_its_remarks(tmp_path):
    copy = tmp_path / "h14.toml"
    copy.write_text(show_recipe(H14))
    assert load_recipe(copy) == load_recipe(H14)
    assert remarks(copy.read_text()) == remarks(H14.read_text())
    assert "#   stages.2: not published; ours: H was released at 84 and 224 only" in copy.read_text()
    assert (
        "# stage 0: 84 px, 390,981 updates of 32,768 samples, 1,563 of them warm-up, peak learning rate 0.001024"
        in (copy.read_text())
    )


def test_a_remark_goes_with_its_value():
    shown = show_recipe(H14, ["stages.2.resolution=224", "model.vision.image_size=224"])
    assert "stages.2: not published" not in shown
    assert "data.block: not published" in shown
    assert "data.block: not published" in show_recipe(H14, smoke=True)


def test_differences_are_those_of_resolved_values(tmp_path):
    assert diff_recipes(H14, H14) == []
    other = tmp_path / "other.toml"
    text = H14.read_text().replace("seed = 0", "seed = 1").replace("weight_decay = 0.2\n", "")
    other.write_text(text.replace("openvision-h14", "other"))
    # Decay is 0.2 by default.
    assert diff_recipes(H14, other) == [("seed", "0", "1")]


def test_openvision_adds_to_clip_a_decoder_a_loss_and_a_text():
    keys = {key for key, _, _ in diff_recipes(RECIPES / "clip.toml", RECIPES / "openvision" / "b16.toml")}
    assert {key for key in keys if not key.startswith("model.decoder.")} == {"loss.caption", "loss.texts"}
    assert "model.decoder.width" in keys


def test_a_tokenizer_larger_than_the_model(tmp_path):
    Tokenizer.train(["a red bar"], 100).save(tmp_path)
    recipe = (RECIPES / "quickstart.toml").read_text().replace("vocab_size = 1024", "vocab_size = 10")
    path = tmp_path / "small.toml"
    path.write_text(recipe.replace('validation = "validation"\nvocab_size = 10', f'tokenizer = "{tmp_path}"'))
    with pytest.raises(OpenVisionError, match=r"data\.tokenizer .* entries, the model only 10; raise vocab_size"):
        check_recipe(path)
    path.write_text(path.read_text().replace("vocab_size = 10\n", "vocab_size = 100\n"))
    assert "is not here yet" not in check_recipe(path)


def test_commands(tmp_path):
    run = CliRunner().invoke
    shown = run(app, ["recipe", "show", str(H14), "--set", "seed=5"])
    assert shown.exit_code == 0, shown.output
    assert "\nseed = 5\n" in shown.output
    same = run(app, ["recipe", "diff", str(H14), str(H14)])
    assert same.output == "no differences, except perhaps name and description\n"
    different = run(app, ["recipe", "diff", str(H14), str(RECIPES / "openvision" / "l14.toml")])
    assert "model.vision.depth" in different.output
    broken = tmp_path / "broken.toml"
    broken.write_text(H14.read_text().replace("jitter =", "jiter ="))
    checked = run(app, ["recipe", "validate", str(broken), str(H14)])
    assert "unknown key augment.jiter (did you mean jitter?)" in checked.output
    assert "1,305.5M parameters (631.7M in the vision tower), 3 stages" in checked.output
    assert "1 of 2 recipes are invalid" in str(checked.exception)

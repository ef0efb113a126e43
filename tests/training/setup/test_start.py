"""A run starts from given weights: parts that both have are taken, others keep their random values.

Tokenizer and shape come along.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w
import torch
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.shards.dataset import ShardWriter
from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.decoders.parallel import DecoderConfig
from openvision.models.genlip import GenLip, GenLipConfig, GenLipTextConfig, GenLipVisionConfig
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import AnyModel, OpenVision2, OpenVision2Config, build_model
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.recipe.schema import Recipe, load_recipe, parse_recipe
from openvision.recipe.sections import WarmStart
from openvision.text.tokenizer import Tokenizer
from openvision.training.run.sessions import read_sessions
from openvision.training.setup import model as setup_model
from openvision.training.setup.parts import set_up_run
from openvision.training.setup.start import describe_start, shape_of, start_from, tokenizer_of_start
from openvision.weights.folder import save_folder
from openvision.weights.jax import to_jax
from openvision.weights.load import load_checkpoint
from tests.conftest import draw
from tests.training.small_step import recipe_of

VISION = VisionConfig(width=32, depth=2, mlp_dim=64, heads=2, patch_size=8, image_size=32)
V1 = OpenVisionConfig(16, VISION, TextConfig(32, 1, 64, 2, 64, 8))
V2 = OpenVision2Config(VISION, AutoregressiveDecoderConfig(32, 1, 64, 2, 64, 9))


def saved(model: AnyModel, folder: Path) -> str:
    save_folder(folder, model, Tokenizer.train(["a red bar"], 40), "", {})
    return str(folder)


def equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_whole_model(tmp_path):
    source, fresh = OpenVision(V1), OpenVision(V1)
    source.logit_scale.data.fill_(3.0)
    assert start_from(fresh, saved(source, tmp_path / "v1")) == ["vision", "text", "logit_scale"]
    assert equal(fresh, source)


def test_version_2_from_a_tower_of_version_1(tmp_path):
    source, fresh = OpenVision(V1), OpenVision2(V2)
    decoder = fresh.decoder.head.weight.clone()
    assert start_from(fresh, saved(source, tmp_path / "v1")) == ["vision"]
    assert equal(fresh.vision.blocks[1], source.vision.blocks[1])
    assert torch.equal(fresh.decoder.head.weight, decoder)


def test_version_1_from_a_tower_without_head(tmp_path):
    source, fresh = OpenVision2(V2), OpenVision(V1)
    assert fresh.vision.head is not None
    head = fresh.vision.head.weight.clone()
    assert start_from(fresh, saved(source, tmp_path / "v2")) == ["vision"]
    assert torch.equal(fresh.vision.head.weight, head)
    assert torch.equal(fresh.vision.cls_token, source.vision.cls_token)


def test_version_2_takes_its_decoder_along(tmp_path):
    source, fresh = OpenVision2(V2), OpenVision2(V2)
    assert start_from(fresh, saved(source, tmp_path / "v2")) == ["vision", "decoder"]
    assert equal(fresh, source)


@pytest.mark.parametrize("kind", ["openvision", "clip", "sigmoid", "joint", "openvision2", "openvision3", "genlip"])
def test_every_kind_goes_on_from_its_own(kind, tmp_path):
    config = recipe_of(kind).model
    source, fresh = build_model(config), build_model(config)
    start_from(fresh, saved(source, tmp_path / "start"))
    assert equal(fresh, source)


def test_a_tree_of_the_original(tmp_path):
    source, fresh = OpenVision(V1), OpenVision(V1)
    # One axis a head, which says how many there are.
    tree = {name: with_head_axis(name, array) for name, array in to_jax(source.state_dict()).items()}
    np.savez(tmp_path / "tree.npz", **tree)  # pyright: ignore[reportArgumentType]
    assert start_from(fresh, str(tmp_path / "tree.npz")) == ["vision", "text", "logit_scale"]
    assert equal(fresh, source)


def with_head_axis(name: str, array: np.ndarray) -> np.ndarray:
    if "/out/kernel" in name:
        return array.reshape(2, -1, array.shape[-1])
    projection = any(f"/{part}/" in name for part in ("query", "key", "value"))
    return array.reshape(*array.shape[:-1], 2, -1) if projection else array


def test_another_number_of_heads_is_refused(tmp_path):
    other = OpenVision(replace(V1, text=replace(V1.text, heads=4)))
    with pytest.raises(OpenVisionError, match=r"its text tower has 2 heads, the recipe's model\.text has 4"):
        start_from(other, saved(OpenVision(V1), tmp_path / "v1"))


@pytest.mark.parametrize("depth", [1, 3])
def test_another_shape_is_refused_before_anything_changes(tmp_path, depth):
    other = OpenVision(replace(V1, vision=replace(VISION, depth=depth)))
    before = other.vision.cls_token.clone()
    with pytest.raises(
        OpenVisionError, match=rf"another shape than the recipe's model\.vision \(depth 2, not {depth}\)"
    ):
        start_from(other, saved(OpenVision(V1), tmp_path / "v1"))
    assert torch.equal(other.vision.cls_token, before)


def test_initial_values_are_no_shape(tmp_path):
    """Beside a depth that stops the copy nothing is named that would not."""
    other = OpenVision(replace(V1, vision=replace(VISION, depth=3, init="by_width")))
    with pytest.raises(OpenVisionError, match=r"model\.vision \(depth 2, not 3\)"):
        start_from(other, saved(OpenVision(V1), tmp_path / "v1"))


def test_another_kind_of_tower_is_named_as_such(tmp_path):
    """GenLIP's tower has rotary positions and gated attention: no width or depth would help."""
    genlip = GenLip(GenLipConfig(GenLipVisionConfig(32, 2, 64, 2, 16, 32), GenLipTextConfig(24, 60, 12)))
    with pytest.raises(OpenVisionError, match=r"its vision tower is of another kind of model .*start from weights of"):
        start_from(OpenVision(V1), saved(genlip, tmp_path / "genlip"))


# What the report names.


def noted(model: AnyModel, source: str, warm: WarmStart | None = None) -> list[str]:
    notes: list[str] = []
    start_from(model, source, warm, note=notes.append)
    return notes


def test_a_fresh_projection_is_named(tmp_path):
    assert noted(OpenVision(V1), saved(OpenVision2(V2), tmp_path / "v2")) == ["vision: head initialised at random"]


def test_an_attention_pool_beside_registers_that_the_start_has(tmp_path):
    registers = replace(VISION, registers=2)
    source = OpenVision(replace(V1, vision=registers))
    fresh = OpenVision(replace(V1, vision=replace(registers, pool="map")))
    assert noted(fresh, saved(source, tmp_path / "registers")) == ["vision: attn_pool initialised at random"]
    assert fresh.vision.reg_token is not None
    assert source.vision.reg_token is not None
    assert torch.equal(fresh.vision.reg_token, source.vision.reg_token)


AUTOREGRESSIVE = AutoregressiveDecoderConfig(32, 1, 64, 2, 64, 9)
GENLIP = GenLipConfig(GenLipVisionConfig(32, 2, 64, 2, 8, 32), GenLipTextConfig(16, 64, 9))


@pytest.mark.parametrize(
    ("theirs", "ours", "note"),
    [
        (
            V1,
            replace(V1, vision=replace(VISION, position_side=8)),
            "vision: start has position_side none, this model 8",
        ),
        (
            V1,
            replace(V1, text=replace(V1.text, pad_id=0, pool="mean")),
            "text: start has pad_id none, this model 0; pool class, this model mean",
        ),
        (
            replace(V1, text=replace(V1.text, pad_id=0), decoder=DecoderConfig(32, 1, 64, 2, 64, 9)),
            replace(
                V1, text=replace(V1.text, pad_id=0), decoder=DecoderConfig(32, 1, 64, 2, 64, 9, reads_padding=False)
            ),
            "decoder: start has reads_padding true, this model false",
        ),
        (
            V2,
            replace(V2, decoder=replace(AUTOREGRESSIVE, image_attention="causal")),
            "decoder: start has image_attention prefix, this model causal",
        ),
        (
            GENLIP,
            replace(GENLIP, vision=replace(GENLIP.vision, rope_theta=1e5, readout="before_last")),
            "vision: start has rope_theta 10000.0, this model 100000.0; readout last, this model before_last",
        ),
        (
            replace(V1, text=replace(V1.text, encoder="bert", pad_id=0)),
            replace(V1, text=replace(V1.text, encoder="bert", pad_id=0, first="bos", norm_eps=1e-12)),
            "text: start has first class, this model bos; norm_eps 1e-06, this model 1e-12",
        ),
    ],
)
def test_settings_that_change_what_weights_mean_are_named(theirs, ours, note, tmp_path):
    assert noted(build_model(ours), saved(build_model(theirs), tmp_path / "start")) == [note]


def test_another_resolution_or_initial_values_are_no_remark(tmp_path):
    ours = replace(V1, vision=replace(VISION, image_size=64, init="by_width"))
    assert noted(OpenVision(ours), saved(OpenVision(V1), tmp_path / "v1")) == []


def test_numbers_of_the_loss_that_are_not_copied_are_named(tmp_path):
    source = saved(OpenVision(V1), tmp_path / "softmax")
    own = saved(OpenVision(replace(V1, logit_scale_sentence=True)), tmp_path / "own")
    sigmoid = OpenVision(replace(V1, logit_bias=True))
    notes: list[str] = []
    taken = start_from(sigmoid, source, note=notes.append)
    assert describe_start(sigmoid, "x", taken, notes) == (
        "start x: copied vision, text (the start's logit scale is of the softmax loss and means nothing in the sigmoid "
        "loss); at initial values: logit_scale, logit_bias"
    )
    per_text = OpenVision(replace(V1, logit_scale_sentence=True))
    assert noted(per_text, source) == ["logit_scale_sentence begins at the start's logit_scale"]
    assert noted(per_text, own) == []
    assert noted(OpenVision(V1), own) == ["the start's logit_scale_sentence is left out"]


def test_a_text_tower_from_a_sentence_encoder_is_not_called_random(tmp_path, monkeypatch):
    encoder = SimpleNamespace(copy_into=lambda tower: "text tower: copied from elsewhere")
    monkeypatch.setattr(setup_model, "read_sentence_encoder", lambda folder: encoder)
    with torch.device("meta"):
        model = OpenVision(V1)
    said: list[str] = []
    source = saved(OpenVision(V1), tmp_path / "v1")
    setup_model.fill(model, 0, source, said.append, WarmStart(text="elsewhere"))
    assert said == [
        f"start {source}: copied vision; at initial values: logit_scale",
        "text tower: copied from elsewhere",
    ]


# With the data of a run.


def started(recipe: Recipe, start: str | Path, **data: object) -> Recipe:
    content: JsonObject = recipe.model_dump(mode="json", exclude_none=True) | {"start": str(start)}
    content["data"] = {**{key: value for key, value in content["data"].items() if key != "vocab_size"}, **data}
    return parse_recipe(content, "started")


@pytest.fixture(scope="module")
def other_words(tmp_path_factory) -> Path:
    """Sixteen images whose texts share no word with those of the shapes."""
    folder = tmp_path_factory.mktemp("words")
    for split in ("train", "validation"):
        with ShardWriter(folder / split) as writer:
            for index in range(16):
                meta = {"name": f"dog {index}", "category": "dog", "synthetic": "Dogs sleep. Dogs eat."}
                writer.write(f"{index}", draw("red", "bar"), "png", f"dog number {index}", meta)
    return folder


@pytest.mark.parametrize("data", [{}, {"vocab_size": 100}])
def test_the_tokenizer_comes_along_and_it_is_said(tiny_recipe, tiny_run, other_words, tmp_path, data):
    said: list[str] = []
    parts = set_up_run(started(tiny_recipe, tiny_run, **data), other_words, tmp_path / "run", say=said.append)
    theirs = load_checkpoint(tiny_run)
    assert theirs.tokenizer is not None
    assert theirs.model is not None
    assert parts.tokenizer.vocabulary_sha256() == theirs.tokenizer.vocabulary_sha256()
    ids = torch.from_numpy(parts.tokenizer.encode(["red square clipart", "a dog"], 12))
    with torch.inference_mode():
        started_model = parts.full_model()
        assert isinstance(started_model, OpenVision)
        assert torch.equal(started_model.text(ids), theirs.model.text(ids))
    unread = "; data.vocab_size 100 is not used" if data else ""
    assert said[:2] == [
        f"start {tiny_run}: its tokenizer of {theirs.tokenizer.vocab_size} entries comes along{unread}",
        f"start {tiny_run}: copied vision, text, decoder, logit_scale",
    ]
    (session,) = read_sessions(tmp_path / "run")
    assert session["start"] == said[:2]


def test_another_vocabulary_is_refused(tiny_recipe, tiny_run, other_words, tmp_path):
    Tokenizer.train(["dog number", "sleep"], 100).save(tmp_path)
    recipe = started(tiny_recipe, tiny_run, tokenizer=str(tmp_path))
    with pytest.raises(OpenVisionError, match=r"trained with another vocabulary .* leave data\.tokenizer out"):
        set_up_run(recipe, other_words, tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer").exists()
    # The images alone know no words.
    save_folder(tmp_path / "tower", load_checkpoint(tiny_run).vision, None, "", {})
    said: list[str] = []
    parts = set_up_run(
        started(tiny_recipe, tmp_path / "tower", tokenizer=str(tmp_path)),
        other_words,
        tmp_path / "new",
        say=said.append,
    )
    assert parts.tokenizer.vocabulary_sha256() == Tokenizer.load(tmp_path).vocabulary_sha256()
    rest = "initialised at random: text, decoder; at initial values: logit_scale"
    assert said == [f"start {tmp_path / 'tower'}: copied vision; {rest}"]


def test_weights_without_a_vocabulary_ask_for_it(tiny_recipe, tiny_run, tmp_path):
    model = load_checkpoint(tiny_run).model
    assert model is not None
    tree = {name: with_head_axis(name, array) for name, array in to_jax(model.state_dict()).items()}
    np.savez(tmp_path / "tree.npz", **tree)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OpenVisionError, match=r"comes without its vocabulary, .* as data\.tokenizer"):
        tokenizer_of_start(str(tmp_path / "tree.npz"), tiny_recipe.model, None)
    own = Tokenizer.load(tiny_run / "model")
    assert tokenizer_of_start(str(tmp_path / "tree.npz"), tiny_recipe.model, own) is own


def test_the_shape_comes_along_to_a_recipe_without_a_model(tiny_recipe, tiny_run, tmp_path):
    content = tiny_recipe.model_dump(mode="json", exclude_none=True)
    del content["model"], content["data"]["vocab_size"]
    content["loss"] = {"caption": 0}
    content["stages"] = [dict(content["stages"][1], resolution=64)]
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(content | {"start": str(tiny_run)}))
    theirs = load_checkpoint(tiny_run).model
    assert theirs is not None
    # Of the start, which this recipe does not train on.
    native = replace(theirs.config, vision=replace(theirs.config.vision, aspects=(1.0, 2.0)))
    save_folder(tmp_path / "native", OpenVision(native), load_checkpoint(tiny_run).tokenizer, "", {})
    (tmp_path / "native.toml").write_text(tomli_w.dumps(content | {"start": str(tmp_path / "native")}))
    assert load_recipe(tmp_path / "native.toml", fill=shape_of).model.vision.aspects == ()
    recipe = load_recipe(tmp_path / "recipe.toml", fill=shape_of)
    vision = replace(theirs.config.vision, image_size=64)
    assert recipe.model == replace(theirs.config, vision=vision, decoder=None)
    with pytest.raises(OpenVisionError, match="key model is missing"):
        load_recipe(tmp_path / "recipe.toml")
    save_folder(tmp_path / "tower", theirs.vision, None, "", {})
    with pytest.raises(OpenVisionError, match="is a vision tower alone, so the recipe must describe the model"):
        shape_of({"start": str(tmp_path / "tower")})


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["recipe", "show"], "[model.vision]"),
        (["recipe", "validate"], "parameters"),
        (["recipe", "diff"], "no differences"),
        (["plan", "--device", "cpu"], "parameters"),
    ],
)
def test_every_command_about_recipes_takes_the_shape_from_the_start(command, says, tiny_recipe, tiny_run, tmp_path):
    content = tiny_recipe.model_dump(mode="json", exclude_none=True) | {"start": str(tiny_run)}
    del content["model"], content["data"]["vocab_size"]
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(content))
    result = CliRunner().invoke(app, [*command, str(path), *([str(path)] if command[1] == "diff" else [])])
    assert result.exit_code == 0, result.exception
    assert says in result.output


def test_a_start_named_on_the_command_line_brings_its_shape_too(tiny_recipe, tiny_run, tmp_path):
    content = tiny_recipe.model_dump(mode="json", exclude_none=True)
    del content["model"]
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(content))
    result = CliRunner().invoke(app, ["recipe", "show", str(path), "--set", f"start={tiny_run}"])
    assert "[model.vision]" in result.output


def test_a_recipe_without_start_needs_a_vocabulary(tiny_recipe):
    content = tiny_recipe.model_dump(mode="json", exclude_none=True)
    del content["data"]["vocab_size"]
    with pytest.raises(OpenVisionError, match="give either vocab_size"):
        parse_recipe(content, "no words")

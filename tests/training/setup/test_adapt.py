"""Weights are taken into another patch size, depth and vocabulary as the recipe says, and frozen towers stay."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from openvision.errors import OpenVisionError
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config, build_model
from openvision.models.openvision3 import OpenVision3, OpenVision3Config
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.recipe.schema import parse_recipe
from openvision.recipe.sections import WarmStart
from openvision.text.tokenizer import Tokenizer
from openvision.training.setup.adapt import chosen_layers, resample_patches, shared_entries
from openvision.training.setup.start import start_from
from openvision.training.trainer import Trainer
from openvision.weights.folder import save_folder
from openvision.weights.load import load_checkpoint
from tests.conftest import TINY_RECIPE
from tests.training.small_step import recipe_of

VISION = VisionConfig(width=32, depth=5, mlp_dim=64, heads=2, patch_size=8, image_size=32)
V1 = OpenVisionConfig(16, VISION, TextConfig(32, 2, 64, 2, 64, 8))


@pytest.fixture
def start(tmp_path) -> Path:
    save_folder(tmp_path / "start", OpenVision(V1), Tokenizer.train(["a red bar"], 64), "", {})
    return tmp_path / "start"


def test_larger_patches_see_enlarged_images_as_before():
    """Filters for patches of 12 px give on enlarged images what those of 8 px gave: enlarging loses nothing."""
    filters, patches = torch.randn(5, 3, 8, 8), torch.randn(20, 3, 8, 8)
    larger = F.interpolate(patches, (12, 12), mode="bilinear", antialias=True)
    before = torch.einsum("dcij,bcij->bd", filters, patches)
    after = torch.einsum("dcij,bcij->bd", resample_patches(filters, 12), larger)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert resample_patches(filters, 8) is filters


def test_smaller_patches_are_the_nearest_there_are():
    filters = torch.randn(5, 3, 8, 8)
    smaller = resample_patches(filters, 4)
    assert smaller.shape == (5, 3, 4, 4)
    units = torch.eye(64).unflatten(1, (1, 8, 8))
    seen = F.interpolate(units, (4, 4), mode="bilinear", antialias=True).flatten(1)
    ours = seen @ smaller.flatten(2).transpose(1, 2)
    least = torch.linalg.lstsq(seen, filters.flatten(2).transpose(1, 2).reshape(5, 64, 3)[0]).solution
    torch.testing.assert_close(ours[0], seen @ least, rtol=1e-3, atol=1e-3)


def test_layers():
    assert chosen_layers(3, 5, "even") == [0, 2, 4]
    assert chosen_layers(5, 5, "even") == [0, 1, 2, 3, 4]
    assert chosen_layers(4, 2, "even") == [0, 0, 1, 1]
    assert chosen_layers(1, 5, "even") == [0]
    assert chosen_layers(3, 5, "first") == [0, 1, 2]
    assert chosen_layers(7, 5, "first") == [0, 1, 2, 3, 4]


def test_patch_size_and_depth(start):
    given = load_checkpoint(start).vision
    model = OpenVision(replace(V1, vision=replace(VISION, depth=3, patch_size=16, image_size=64)))
    notes: list[str] = []
    assert start_from(model, str(start), WarmStart(patches="resample", layers="even"), note=notes.append) == [
        "vision",
        "text",
        "logit_scale",
    ]
    assert notes == ["vision: 3 blocks are blocks 0, 2, 4 of 5", "vision: patch filters resampled from 8 to 16 px"]
    for ours, theirs in zip(model.vision.blocks, (given.blocks[index] for index in (0, 2, 4)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    torch.testing.assert_close(
        model.vision.patch_embed.proj.weight, resample_patches(given.patch_embed.proj.weight, 16)
    )
    deeper = OpenVision(replace(V1, vision=replace(VISION, depth=6)))
    last = deeper.vision.get_parameter("blocks.5.mlp.fc1.weight").clone()
    start_from(deeper, str(start), WarmStart(layers="first"), note=notes.append)
    assert torch.equal(deeper.vision.get_parameter("blocks.5.mlp.fc1.weight"), last)
    assert notes[-1] == "vision: blocks beyond the start's are initialised at random, of 6"


def test_openvision_3_in_another_depth_and_patch_size(tmp_path):
    """Of latents, patches of 8 px are filters of 2 x 2; the reconstruction decoder is a tower like the others."""
    small = recipe_of("openvision3").model
    assert isinstance(small, OpenVision3Config)
    given = OpenVision3(small)
    save_folder(tmp_path / "start", given, Tokenizer.train(["a red bar"], 40), "", {})
    config = replace(
        small,
        vision=replace(small.vision, depth=2, patch_size=16),
        reconstruction=replace(small.reconstruction, depth=1),
    )
    model, notes = OpenVision3(config), []
    with pytest.raises(OpenVisionError, match=r'warm_start.layers = "even" and warm_start.patches = "resample"'):
        start_from(model, str(tmp_path / "start"))
    with pytest.raises(OpenVisionError, match="its reconstruction tower has another shape"):
        start_from(model, str(tmp_path / "start"), WarmStart(patches="resample", layers="even"), note=notes.append)
    assert notes == [
        "vision: 2 blocks are blocks 0, 2 of 3",
        "vision: patch filters resampled from 8 to 16 px",
        "reconstruction: 1 blocks are blocks 0 of 2",
    ]
    filters = given.vision.patch_embed.proj.weight
    torch.testing.assert_close(model.vision.patch_embed.proj.weight, resample_patches(filters, 4))
    model, same_patches = OpenVision3(replace(config, vision=replace(small.vision, depth=2))), WarmStart(layers="even")
    taken = start_from(model, str(tmp_path / "start"), same_patches)
    assert taken == ["vision", "text", "decoder", "reconstruction", "logit_scale"]
    ours, theirs = (one.reconstruction.get_parameter("blocks.0.mlp.fc1.weight") for one in (model, given))
    assert torch.equal(ours, theirs)


def test_without_the_table_another_shape_is_refused_with_the_remedy(start):
    model = OpenVision(replace(V1, vision=replace(VISION, depth=3, patch_size=16, image_size=64)))
    remedy = 'or set warm_start.layers = "even" and warm_start.patches = "resample"$'
    with pytest.raises(OpenVisionError, match=remedy):
        start_from(model, str(start))
    with pytest.raises(OpenVisionError, match="depth 5, not 3"):
        start_from(model, str(start), WarmStart(patches="resample"))


@pytest.mark.parametrize(
    ("change", "warm", "left"),
    [
        ({"pool": "map", "registers": 1}, WarmStart(frozen=("vision",)), "leaves reg_token, attn_pool of the vision"),
        (
            {"depth": 7},
            WarmStart(layers="first", frozen=("vision",)),
            r"leaves blocks\.5, blocks\.6 of the vision tower",
        ),
    ],
)
def test_a_frozen_tower_must_not_stay_at_random(start, change, warm, left):
    model = OpenVision(replace(V1, vision=replace(VISION, **change)))
    with pytest.raises(
        OpenVisionError, match=rf"{left}.* where warm_start\.frozen would keep it; leave 'vision' out of"
    ):
        start_from(model, str(start), warm)
    start_from(model, str(start), warm.model_copy(update={"frozen": ("text",)}))


def test_a_frozen_text_tower_that_the_start_lacks(tmp_path):
    captioner = OpenVision2(OpenVision2Config(VISION, AutoregressiveDecoderConfig(32, 1, 64, 2, 64, 9)))
    save_folder(tmp_path / "v2", captioner, Tokenizer.train(["a red bar"], 64), "", {})
    with pytest.raises(OpenVisionError, match=r"has no text tower for this kind of model, where warm_start\.frozen"):
        start_from(OpenVision(V1), str(tmp_path / "v2"), WarmStart(frozen=("text",)))
    # The projection, which OpenVision 2 lacks, is trained; and a sentence encoder fills its tower afterwards.
    start_from(OpenVision(V1), str(tmp_path / "v2"), WarmStart(frozen=("vision",)))
    start_from(OpenVision(V1), str(tmp_path / "v2"), WarmStart(text="encoder", frozen=("text",)))


def test_a_frozen_text_tower_knows_every_entry(start):
    warm = WarmStart(vocabulary="by_entry", frozen=("text",))
    given = load_checkpoint(start).tokenizer
    assert given is not None
    model = OpenVision(replace(V1, text=replace(V1.text, vocab_size=128)))
    with pytest.raises(OpenVisionError, match=r"leaves \d+ rows of token_embed of the text tower at random"):
        start_from(model, str(start), warm, Tokenizer.train(["zebras quickly jump"], 128))
    # Rows behind the vocabulary are never read.
    start_from(model, str(start), warm, given)


def test_longer_and_shorter_texts(start):
    """Ids keep their positions, and the class token, which is last, keeps its own."""
    given = load_checkpoint(start).model
    assert isinstance(given, OpenVision)
    for length in (12, 5):
        model = OpenVision(replace(V1, text=replace(V1.text, context_length=length)))
        fresh, notes = model.text.pos_embed.detach().clone(), list[str]()
        with pytest.raises(
            OpenVisionError, match=rf'context_length 8, not {length}.*or set warm_start.context = "keep"$'
        ):
            start_from(model, str(start))
        start_from(model, str(start), WarmStart(context="keep"), note=notes.append)
        ours, theirs, kept = model.text.pos_embed, given.text.pos_embed, min(length, 8) - 1
        assert torch.equal(ours[:, :kept], theirs[:, :kept])
        assert torch.equal(ours[:, -1], theirs[:, -1])
        assert torch.equal(ours[:, kept:-1], fresh[:, kept:-1])
        assert notes == [f"text.pos_embed: {kept + 1} positions copied, {'4 fresh' if length > 8 else '3 left out'}"]
    # A text tower that is not trained must know all its positions.
    model = OpenVision(replace(V1, text=replace(V1.text, context_length=12)))
    with pytest.raises(OpenVisionError, match="leaves 4 positions of pos_embed of the text tower at random"):
        start_from(model, str(start), WarmStart(context="keep", frozen=("text",)))


@pytest.mark.parametrize("kind", ["openvision", "openvision2"])
def test_longer_captions(kind, tmp_path):
    """The queries of version 1 are positions, and so are learned ones of OpenVision 2."""
    config = recipe_of(kind).model
    assert isinstance(config, OpenVisionConfig | OpenVision2Config)
    assert config.decoder is not None
    if isinstance(config, OpenVision2Config):
        config = replace(config, decoder=replace(config.decoder, text_positions="learned"))
    assert config.decoder is not None
    given, name = build_model(config), "queries" if kind == "openvision" else "pos_embed"
    save_folder(tmp_path / "start", given, Tokenizer.train(["a red bar"], 40), "", {})
    longer = replace(config.decoder, caption_length=config.decoder.caption_length + 3)
    model, notes = build_model(replace(config, decoder=longer)), list[str]()
    start_from(model, str(tmp_path / "start"), WarmStart(context="keep"), note=notes.append)
    ours, theirs = (one.get_parameter(f"decoder.{name}") for one in (model, given))
    assert torch.equal(ours[..., :-3, :], theirs)
    assert f"decoder.{name}: {theirs.shape[-2]} positions copied, 3 fresh" in notes


def run_of(start: Path, warm: dict, **data):
    recipe = copy.deepcopy(TINY_RECIPE)
    recipe |= {"name": "warm", "start": str(start), "warm_start": warm, "loss": {"caption": 0, "texts": ["alt"]}}
    vision, text = ({**V1.to_dict()[name]} for name in ("vision", "text"))
    recipe["model"] = {"embed_dim": 16, "vision": vision, "text": text | {"vocab_size": 128}}
    recipe["data"] = {"train": "train", "validation": "validation", **data}
    recipe["stages"] = [{"resolution": 32, "samples": 16, "batch_size": 8, "base_learning_rate": 0.01}]
    return parse_recipe(recipe, "warm")


def test_another_vocabulary_and_a_frozen_tower(start, shapes_folder, tmp_path):
    """Locked-image tuning with new words: the image tower is that of the start after training, words both have too."""
    recipe = run_of(start, {"vocabulary": "by_entry", "frozen": ["vision"]}, vocab_size=128)
    trainer = Trainer(recipe, shapes_folder, tmp_path / "run")
    text, given = trainer.parts.model.module.text, load_checkpoint(start)
    assert text is not None
    assert given.model is not None
    assert given.tokenizer is not None
    ours, theirs = shared_entries(trainer.parts.tokenizer, given.tokenizer)
    assert 5 < len(ours) < trainer.parts.tokenizer.vocab_size
    assert torch.equal(text.token_embed.weight[ours], given.model.text.token_embed.weight[theirs])

    assert f"text.token_embed.weight: {len(ours)} rows copied by entry, {128 - len(ours)} fresh" in (
        (tmp_path / "run" / "sessions.json").read_text()
    )
    trainer.run()
    trained = load_checkpoint(tmp_path / "run").model
    assert trained is not None
    for (name, own), before in zip(trained.vision.named_parameters(), given.vision.parameters(), strict=True):
        assert torch.equal(own, before) == (not name.startswith("head.")), name
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(trained.text.get_parameter(name), given.model.text.get_parameter(name))


def test_the_text_tower_alone_stays_locked_behind_a_smaller_image_tower(start, shapes_folder, tmp_path):
    """A student inherits its teacher's text tower and vocabulary, and its own image tower learns that space."""
    recipe = run_of(start, {"towers": ["text"], "frozen": ["text"]})
    vision = VisionConfig(width=16, depth=1, mlp_dim=16, heads=1, patch_size=16, image_size=32)
    recipe = recipe.model_copy(update={"model": replace(V1, vision=vision)})
    trainer = Trainer(recipe, shapes_folder, tmp_path / "run")
    given, model = load_checkpoint(start), trainer.parts.model.module
    assert given.model is not None
    assert given.tokenizer is not None
    assert trainer.parts.tokenizer.vocabulary() == given.tokenizer.vocabulary()
    assert isinstance(model, OpenVision)
    assert torch.equal(model.logit_scale, given.model.logit_scale)
    said = "copied text, logit_scale; initialised at random: vision"
    assert said in (tmp_path / "run" / "sessions.json").read_text()
    trainer.run()
    trained = load_checkpoint(tmp_path / "run").model
    assert trained is not None
    for (name, own), before in zip(trained.text.named_parameters(), given.model.text.parameters(), strict=True):
        assert torch.equal(own, before) == (not name.startswith("head.")), name
    assert trained.vision.config.width == 16


def test_the_vision_tower_alone_brings_no_vocabulary(start, shapes_folder, tmp_path):
    recipe = run_of(start, {"towers": ["vision"]}, vocab_size=50)
    trainer = Trainer(recipe, shapes_folder, tmp_path / "run")
    given = load_checkpoint(start)
    assert given.tokenizer is not None
    assert trainer.parts.tokenizer.vocabulary() != given.tokenizer.vocabulary()
    assert "copied vision; initialised at random: text" in (tmp_path / "run" / "sessions.json").read_text()
    assert torch.equal(trainer.parts.model.module.vision.patch_embed.proj.weight, given.vision.patch_embed.proj.weight)


def test_a_tower_that_the_start_lacks(start, tmp_path):
    save_folder(tmp_path / "images", load_checkpoint(start).vision, None, "", {})
    with pytest.raises(OpenVisionError, match=r"has no text tower for this kind of model, which warm_start"):
        start_from(OpenVision(V1), str(tmp_path / "images"), WarmStart(towers=("text",)))


@pytest.mark.parametrize(
    ("warm", "message"),
    [
        ({"towers": []}, "towers is empty, so nothing is taken"),
        ({"towers": ["text", "decoder"]}, "names 'decoder', which the model does not have"),
        ({"towers": ["vision"], "frozen": ["text"]}, "names 'text', which warm_start.towers does not take"),
        ({"towers": ["words"]}, "towers"),
    ],
)
def test_towers_that_cannot_be_taken(start, warm, message):
    with pytest.raises(OpenVisionError, match=message):
        run_of(start, warm)


@pytest.mark.parametrize(
    ("towers", "is_started", "message"),
    [
        (["text", "vision"], True, "takes the text tower from elsewhere"),
        (["vision"], False, "says how weights are taken from `start`; give start"),
    ],
)
def test_towers_beside_a_sentence_encoder(start, towers, is_started, message):
    table = run_of(start, {"towers": ["vision"]}, vocab_size=64).model_dump(exclude_none=True)
    table["model"]["text"] |= {"encoder": "bert", "pad_id": 0}
    table["data"].pop("vocab_size")
    table["warm_start"] = {"text": "encoder", "towers": towers}
    if not is_started:
        del table["start"]
    with pytest.raises(OpenVisionError, match=message):
        parse_recipe(table, "beside")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": None}, "says how weights are taken from `start`; give start"),
        ({"data": {"train": "train"}}, "takes another vocabulary: give data.vocab_size or data.tokenizer"),
    ],
)
def test_tables_that_cannot_be(start, change, message):
    recipe = run_of(start, {"vocabulary": "by_entry"}, vocab_size=64).model_dump(exclude_none=True)
    with pytest.raises(OpenVisionError, match=message):
        parse_recipe({key: value for key, value in (recipe | change).items() if value is not None}, "bad")

"""One image that keeps its aspect: its grid, its rows, batches of several shapes, training, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.files import read_json_lines
from openvision.multimodal.data.batching import Collator
from openvision.multimodal.data.conversation import IGNORED
from openvision.multimodal.data.dataset import ConversationDataset, read_llava_json
from openvision.multimodal.data.feature_cache import FeatureCache, patch_features
from openvision.multimodal.model.build import BuildOptions, assemble, build, save
from openvision.multimodal.model.generate import Prompt, load_assistant
from openvision.multimodal.model.native import row_break
from openvision.multimodal.model.towers import tower_of
from openvision.multimodal.recipe import parse_vlm_recipe
from openvision.multimodal.training.run import train
from openvision.weights.folder import save_folder
from tests.multimodal import tiny


@pytest.fixture(scope="module")
def assistant(native_folder):
    return load_assistant(native_folder, "cpu")


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


WIDE, TALL, SQUARE = noise(80, 20), noise(30, 60), noise(40, 40)


def test_an_image_is_its_grid_with_a_line_break_behind_each_row(assistant) -> None:
    shapes = {size: assistant.geometry.native_grid(*size) for size in ((40, 40), (20, 80), (60, 30))}
    assert shapes == {(40, 40): (5, 5), (20, 80): (2, 8), (60, 30): (6, 3)}
    inputs = assistant.prepare([Prompt("What?", (WIDE,))])
    ids, image = inputs["input_ids"][0].tolist(), assistant.processor.image_token_id
    end_of_row = row_break(assistant.processor.tokenizer)
    begin = ids.index(image)
    assert ids[begin : begin + 18] == ([image] * 8 + [end_of_row]) * 2
    assert ids.count(image) == 16
    assert inputs["image_sizes"].tolist() == [[16, 64]]
    assert assistant.geometry.tokens(20, 80) == 18


def test_the_language_model_reads_the_features_of_the_encoder(assistant) -> None:
    vision = tiny.encoder().vision
    inputs = assistant.prepare([Prompt("A", (WIDE,)), Prompt("B", (TALL, SQUARE))])
    with torch.inference_mode():
        found = assistant.model.model.get_image_features(
            pixel_values=inputs["pixel_values"],
            image_sizes=inputs["image_sizes"],
            vision_feature_layer=assistant.model.config.vision_feature_layer,
            vision_feature_select_strategy="full",
        ).pooler_output
        project = assistant.model.model.multi_modal_projector
        for tokens, image in zip(found, (WIDE, TALL, SQUARE), strict=True):
            pixels = torch.from_numpy(assistant.geometry.native.prepare(image)).permute(2, 0, 1)[None]
            layer = vision.forward_features(pixels, layers=(-2,)).layers[0].patch_tokens
            torch.testing.assert_close(tokens, project(layer)[0], atol=1e-5, rtol=1e-4)


def test_registers_reach_no_language_model() -> None:
    """Towers with registers and a pooling head, for which stock classes have no place."""
    checkpoint = tiny.encoder(replace(tiny.VISION, registers=4, pool="map"))
    tower, images = tower_of(checkpoint, max_tokens=25), torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        states = tower.model(images, image_sizes=torch.tensor([[40, 40], [16, 24]])).hidden_states[-2]
        wanted = [
            checkpoint.vision.forward_features(one, layers=[-2]).layers[0].patch_tokens[0]
            for one in (images[:1], images[1:, :, :16, :24])
        ]
    assert len(wanted[0]) == 25
    torch.testing.assert_close(states[0], torch.cat(wanted))
    with pytest.raises(OpenVisionError, match=r"registers or pools by attention.*--framework llava-native"):
        tower_of(checkpoint)


def test_padding_reaches_nothing(assistant) -> None:
    inputs = assistant.prepare([Prompt("What?", (WIDE,)), Prompt("What is it?", (TALL,))])
    with torch.inference_mode():
        before = assistant.model(**inputs).logits
        assert inputs["pixel_values"].shape == (2, 3, 48, 64)
        inputs["pixel_values"][0, :, 16:] = 9.0
        inputs["pixel_values"][1, :, :, 24:] = 9.0
        assert torch.equal(assistant.model(**inputs).logits, before)


def test_a_square_is_the_square_model_but_for_the_rows(assistant, model_folder) -> None:
    square = load_assistant(model_folder, "cpu")
    size = assistant.geometry.native.shape_of(40, 40)
    assert size == (40, 40)
    native = assistant.prepare([Prompt("What?", (SQUARE,))])
    with torch.inference_mode():
        features = patch_features(assistant.model, native["pixel_values"])
        # The square model takes 44 px and drops what does not fill a patch.
        expected = patch_features(square.model, torch.nn.functional.pad(native["pixel_values"], (0, 4, 0, 4)))
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def dataset(assistant, folder) -> ConversationDataset:
    collection = read_llava_json([folder / "train.json"], folder / "images")
    return ConversationDataset(collection.samples, assistant.processor, assistant.geometry, "native", 400)


def collator(assistant, **settings) -> Collator:
    processor = assistant.processor
    return Collator(processor.tokenizer.pad_token_id, processor.image_token_id, assistant.geometry, **settings)


def loss(assistant, batch) -> float:
    with torch.no_grad():
        logits = assistant.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=IGNORED
    ).item()


@pytest.mark.parametrize("packed", [False, True])
def test_batches_do_not_change_the_loss(assistant, data_folder, packed) -> None:
    data = dataset(assistant, data_folder)
    items = [data[index] for index in (0, 1, 2, 12)]
    alone = sum(loss(assistant, collator(assistant)([item])) for item in items)
    assert loss(assistant, collator(assistant, packed=packed)(items)) == pytest.approx(alone, rel=1e-5)


def test_a_blank_image_changes_no_loss_and_gives_the_projector_a_gradient(assistant, data_folder) -> None:
    items = [dataset(assistant, data_folder)[12]]
    plain, blank = collator(assistant)(items), collator(assistant, blank=True)(items)
    assert loss(assistant, blank) == pytest.approx(loss(assistant, plain), rel=1e-5)
    assistant.model(**blank).loss.backward()
    assert assistant.model.model.multi_modal_projector.linear_1.weight.grad.abs().max() == 0
    assistant.model.zero_grad()


def test_the_prompt_in_training_is_the_prompt_at_inference(assistant, data_folder) -> None:
    data = dataset(assistant, data_folder)
    item, image = data[1], data.samples[1].images[0].open()
    question = data.samples[1].conversation.turns[0].text.removeprefix("<image>\n")
    prompt = assistant.prepare([Prompt(question, (image,))])["input_ids"][0].tolist()
    assert item["input_ids"][: len(prompt)] == prompt


def test_an_extreme_aspect_is_replaced_in_training_and_refused_from_a_person(assistant, data_folder, tmp_path) -> None:
    data = dataset(assistant, data_folder)
    long = tmp_path / "long.png"
    noise(300, 10).save(long)
    object.__setattr__(data.samples[0].images[0], "path", long)
    assert data[0]["input_ids"] == data[1]["input_ids"]
    assert data.replaced == {"image unreadable": 1}
    with pytest.raises(OpenVisionError, match="300 x 10 pixels is beyond the largest bucket"):
        assistant.prepare([Prompt("What?", (noise(300, 10),))])


def test_buckets_of_the_tower_are_those_of_the_model(llm_folder, tmp_path) -> None:
    config = replace(tiny.VISION, aspects=(1.0, 8.0))
    tower = tower_of(tiny.encoder(config), max_tokens=25)
    assert tower.geometry.native_grid(10, 80) == (2, 12)
    options = BuildOptions(framework="llava-native")
    save(assemble(tower, tiny.tiny_llm(llm_folder), options), tmp_path / "model", {}, options)
    assert load_assistant(tmp_path / "model", "cpu").geometry.native_grid(10, 80) == (2, 12)


def test_cached_features_of_several_shapes(assistant, data_folder, tmp_path) -> None:
    data = dataset(assistant, data_folder)
    cache = FeatureCache(tmp_path, "key", assistant.geometry, torch.float32)
    images = [image for sample in data.samples for image in sample.images]
    missing = [(key, images[row]) for key, row in cache.missing(images, "native")]
    cache.fill(missing, data.pixels, lambda pixels: patch_features(assistant.model, pixels), print)
    plain = [data[index] for index in (0, 1, 2)]
    data.features = cache
    for item, cached in zip(plain, [data[index] for index in (0, 1, 2)], strict=True):
        assert item["input_ids"] == cached["input_ids"]
        tower = assistant.model.model.vision_tower
        with torch.inference_mode():
            layer = tower(item.get("native", [])[0][None]).hidden_states[-2]
        torch.testing.assert_close(cached.get("native", [])[0], layer[0])


def recipe(**changes):
    stage = {"name": "s", "conversations": "train.json", "images": "images", "samples": 12, "batch_size": 4}
    stage |= {"max_length": 400, "aspect": "native", "learning_rate": {"projector": 1e-2, "llm": 1e-2}}
    run = {"precision": "float32", "micro_batch": 2, "log_every": 1}
    content = {"name": "n", "framework": "llava-native", "stages": [stage | changes.pop("stage", {})]}
    return parse_vlm_recipe(content | {"run": run | changes.pop("run", {})} | changes, "n")


def losses(run) -> list[float]:
    return [line["loss"] for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]


def test_a_run_trains_with_features_cached_or_not_and_keeps_its_budget(native_folder, data_folder, tmp_path) -> None:
    # One process, words and a smaller budget: the run says what the model reads from then on.
    train(recipe(run={"cache_features": "never"}), native_folder, data_folder, tmp_path / "plain", device="cpu")
    train(recipe(run={"cache_features": "always"}), native_folder, data_folder, tmp_path / "cached", device="cpu")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    words = recipe(max_tokens=16, stage={"objective": "words", "learning_rate": {"projector": 1e-2}})
    model = train(words, native_folder, data_folder, tmp_path / "words", device="cpu")
    trained = load_assistant(model, "cpu")
    assert trained.geometry.most_patches == 16
    assert trained.geometry.native_grid(40, 40) == (4, 4)
    assert trained.answer([Prompt("What?", (WIDE,))])[0] is not None


def test_build_from_the_command_line(llm_folder, tmp_path) -> None:
    save_folder(tmp_path / "encoder", tiny.encoder().vision, None, "", {})
    arguments = ["vlm", "build", "--encoder", str(tmp_path / "encoder"), "--llm", str(llm_folder)]
    arguments += ["--framework", "llava-native"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "vlm")])
    assert done.exit_code == 0, done.output
    assert "up to 25 patches an image in native shapes" in done.output
    assert json.loads((tmp_path / "vlm" / "openvision_vlm.json").read_text())["max_tokens"] == 25
    small = CliRunner().invoke(app, [*arguments, "--max-tokens", "9", "-o", str(tmp_path / "small")])
    assert "a budget of 9 tokens is too small for an image of 4 to 1; set max_tokens to 16" in str(small.exception)
    squares = [*arguments[:-1], "llava-1.5", "--max-tokens", "64", "-o", str(tmp_path / "small")]
    assert "max_tokens is of llava-native alone, not of llava-1.5" in str(CliRunner().invoke(app, squares).exception)
    assert not (tmp_path / "small").exists()


def test_an_encoder_of_one_grid_is_refused(llm_folder, tmp_path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = CLIPVisionConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3)
    CLIPVisionModel(shape).save_pretrained(tmp_path / "clip")
    with pytest.raises(OpenVisionError, match="is a stock clip_vision_model, whose positions are of one grid"):
        build(tmp_path / "clip", llm_folder, tmp_path / "vlm", BuildOptions(framework="llava-native"))
    with pytest.raises(OpenVisionError, match="was loaded for squares, which llava-native does not read"):
        assemble(tiny.tiny_tower(), tiny.tiny_llm(llm_folder), BuildOptions(framework="llava-native"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": {"aspect": "pad"}}, "aspect 'pad' does not fit llava-native"),
        ({"max_tokens": 9}, "max_tokens 9 is too small for an image of 4 to 1; set it to 16 or more"),
        (
            {"framework": "llava-1.5", "stage": {"aspect": "pad"}, "max_tokens": 64},
            "max_tokens is of llava-native alone",
        ),
    ],
)
def test_bad_recipes(changes, message) -> None:
    with pytest.raises(OpenVisionError, match=message):
        recipe(**changes)


def test_a_model_of_squares_is_not_trained_natively(model_folder, data_folder, tmp_path) -> None:
    with pytest.raises(OpenVisionError, match="holds a llava model, but the recipe is for llava-native; build the"):
        train(recipe(), model_folder, data_folder, tmp_path / "run", device="cpu")

"""Models around encoders of every shape: tokens, prefix, stock loading, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.frozen.config import AutoencoderConfig
from openvision.frozen.conv import ConvAutoencoder, ConvConfig, save_conv
from openvision.models.genlip import GenLipVisionConfig
from openvision.models.openvision3 import LatentVisionConfig, build_vision
from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.multimodal.data.feature_cache import patch_features
from openvision.multimodal.model.build import BuildOptions, assemble, build
from openvision.multimodal.model.generate import Decoding, Prompt, load_assistant
from openvision.multimodal.model.geometry import Geometry, anyres_pinpoints, check_processor
from openvision.multimodal.model.llm import TokenizerOptions, load_llm
from openvision.multimodal.model.towers import load_tower, tower_of
from openvision.multimodal.model.toy import TEMPLATE, write_small_llm, write_toy_llm
from openvision.multimodal.recipe import LearningRates
from openvision.multimodal.training.modules import choose_trained
from openvision.weights.folder import save_folder
from openvision.weights.registry import available_models, released
from tests.multimodal import tiny

# Tokens of one square by the papers' tables (papers.md section 1.1).
TOKENS = {
    ("16", 160): 100, ("16", 224): 196, ("16", 384): 576, ("8", 160): 400, ("8", 224): 784, ("8", 384): 2304,
    ("2", 224): 196, ("2", 256): 256,
    ("14", 84): 36, ("14", 224): 256, ("14", 336): 576, ("14", 384): 729, ("14", 448): 1024,
}  # fmt: skip


def ask(model, processor, image):
    """Ids and images of one question, by the stock processor alone."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )


def test_every_released_name_has_the_tokens_of_its_shape() -> None:
    for name in available_models():
        patch, side = name.split("patch")[1].split("-")[0], released(name).vision.image_size
        assert released(name).tokens == TOKENS[patch, side]


def shapes() -> list[str]:
    """The cheapest released models that have every patch size, resolution and width between them."""

    def cost(name: str) -> int:
        return released(name).tokens * released(name).vision.width ** 2

    seen, chosen = set(), []
    # OpenVision 3 sees latents, which no stock tower does.
    on_pixels = [name for name in available_models() if not name.startswith("openvision3-")]
    for name in sorted(on_pixels, key=cost):
        vision = released(name).vision
        has = {("grid", vision.patch_size, vision.image_size), ("width", vision.width)}
        if not has <= seen:
            chosen.append(name)
        seen |= has
    return chosen


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if any(size in name for size in ("huge", "giant", "so400m")) else []
        )
        for name in shapes()
    ],
)
def test_every_released_shape_builds_and_runs(llm_folder, name) -> None:
    entry = released(name)
    # One block is read, one lies behind it; full width, resolution and patches.
    config = replace(entry.vision, depth=2)
    built = assemble(tower_of(tiny.encoder(config), check=False), load_llm(llm_folder), BuildOptions())
    patch = name.split("patch")[1].split("-")[0]
    expected = TOKENS[patch, config.image_size]
    assert built.geometry == Geometry(config.image_size, config.patch_size, 1, config.width, 2)
    assert built.geometry.patches == entry.tokens == expected
    inputs = ask(built.model, built.processor, Image.new("RGB", (50, 40), "red"))
    assert (inputs["input_ids"] == built.model.config.image_token_id).sum() == expected
    with torch.inference_mode():
        logits = built.model(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert torch.isfinite(logits).all()


def own_tower(kind: str, folder: Path) -> VisionTransformer:
    """A tower that no stock class can hold."""
    torch.manual_seed(0)
    if kind == "genlip":
        return build_vision(GenLipVisionConfig(48, 3, 64, 2, 16, 32), None).eval()
    autoencoder = AutoencoderConfig("pixels", None, 192, 8, 1.0)
    if kind == "conv":
        save_conv(folder / "conv", ConvAutoencoder(ConvConfig(4, (8, 8, 8))), 2.5, {})
        autoencoder = AutoencoderConfig("conv", str(folder / "conv"), 4, 8, 2.5)
    return build_vision(LatentVisionConfig(48, 3, 64, 2, 16, 32, autoencoder=autoencoder), None).eval()


@pytest.mark.parametrize("kind", ["genlip", "pixels", "conv"])
def test_an_encoder_that_no_stock_class_holds_travels_with_the_model(kind, llm_folder, tmp_path) -> None:
    vision = own_tower(kind, tmp_path)
    save_folder(tmp_path / "encoder", vision, None, "", {})
    geometry = build(tmp_path / "encoder", llm_folder, tmp_path / "vlm")
    assert geometry == Geometry(32, 16, 0 if kind == "genlip" else 1, 48, 3)
    # Nothing outside of the folder is needed any more.
    shutil.rmtree(tmp_path / "encoder")
    shutil.rmtree(tmp_path / "conv", ignore_errors=True)
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "vlm" / "config.json").read_text()))
    assistant = load_assistant(tmp_path / "vlm", device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    inputs = ask(assistant.model, assistant.processor, image)
    found = patch_features(assistant.model, inputs["pixel_values"])
    own = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    expected = own_tower(kind, tmp_path).forward_features(own, layers=[-2]).layers[0].patch_tokens
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(assistant.answer([Prompt("What is it?", [image])], Decoding(max_new_tokens=2))) == 1
    # What the projector does not read stays frozen when the encoder is trained.
    choose_trained(assistant.model, LearningRates(projector=1e-3, encoder=1e-3), None)
    trained = {name for name, parameter in assistant.model.named_parameters() if parameter.requires_grad}
    encoder = {name.split("tower.tower.")[1] for name in trained if "tower.tower." in name}
    assert {"patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.1.mlp.fc1.weight"} <= encoder
    assert not [name for name in trained if "blocks.2" in name or "fc_norm" in name or "autoencoder" in name]


@pytest.mark.parametrize("framework", ["llava-1.5", "llava-next"])
def test_stock_classes_load_the_folder(llm_folder, tmp_path, framework) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    checkpoint = tiny.encoder()
    save_folder(tmp_path / "encoder", checkpoint.vision, None, "", {})
    geometry = build(tmp_path / "encoder", llm_folder, tmp_path / "vlm", BuildOptions(framework=framework))  # pyright: ignore[reportArgumentType]
    content = json.loads((tmp_path / "vlm" / "config.json").read_text())
    assert "auto_map" not in content
    assert str(tmp_path) not in json.dumps(content)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm", output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "vlm")
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inputs = ask(model, processor, Image.new("RGB", (60, 31), "blue"))
    with torch.inference_mode():
        model(**inputs)
        pixels = inputs["pixel_values"].flatten(0, -4)
        ours = checkpoint.vision.forward_features(pixels, layers=[-2]).layers[0].patch_tokens
    torch.testing.assert_close(seen[0], ours, atol=1e-5, rtol=1e-5)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == geometry.tokens(31, 60)
    assert len(seen[0]) == geometry.squares(31, 60)


@pytest.mark.parametrize("layer", [-1, -3, 1])
def test_the_feature_layer_is_the_one_asked_for(llm_folder, layer) -> None:
    checkpoint = tiny.encoder()
    built = assemble(tower_of(checkpoint), load_llm(llm_folder), BuildOptions(feature_layer=layer))
    seen = []
    built.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.randn(1, 3, 44, 44)
    with torch.inference_mode():
        built.model.model.get_image_features(pixels)
        ours = checkpoint.vision.forward_features(pixels, layers=[layer]).layers[0].patch_tokens
    torch.testing.assert_close(seen[0], ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_feature_layer_that_does_not_exist(llm_folder, layer) -> None:
    with pytest.raises(OpenVisionError, match="encoder has 3 blocks"):
        assemble(tiny.tiny_tower(), load_llm(llm_folder), BuildOptions(feature_layer=layer))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_stock_towers(llm_folder, tmp_path, kind) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    name, prefix = {"clip": ("CLIP", 1), "siglip": ("Siglip", 0)}[kind]
    config = getattr(transformers, f"{name}VisionConfig")(**sizes, image_size=32, patch_size=8)
    getattr(transformers, f"{name}VisionModel")(config).save_pretrained(tmp_path / kind)
    preparation = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(preparation | {"resample": 3}))
    tower = load_tower(tmp_path / kind)
    assert (tower.geometry.prefix_tokens, tower.geometry.patches) == (prefix, 16)
    built = assemble(tower, load_llm(llm_folder), BuildOptions())
    assert built.processor.image_processor.image_mean == (0.1, 0.1, 0.1)
    assert built.processor.image_processor.resample == 3
    inputs = ask(built.model, built.processor, Image.new("RGB", (50, 40)))
    assert (inputs["input_ids"] == built.model.config.image_token_id).sum() == 16
    with torch.inference_mode():
        assert torch.isfinite(built.model(**inputs).logits).all()


def test_another_model_is_no_tower(llm_folder) -> None:
    with pytest.raises(OpenVisionError, match="model of type 'llama'"):
        load_tower(llm_folder)


@pytest.mark.parametrize("size", [(40, 40), (31, 200), (200, 31), (64, 90), (500, 499), (10, 30), (44, 132)])
def test_anyres_tokens_are_the_stock_ones(next_folder, size) -> None:
    from transformers import AutoConfig, AutoProcessor

    processor = AutoProcessor.from_pretrained(next_folder)
    config: Any = AutoConfig.from_pretrained(next_folder)
    geometry = check_processor(processor, config, "model")
    inputs = processor(text="<image>", images=Image.new("RGB", size[::-1]), return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == geometry.tokens(*size)
    assert inputs["pixel_values"].shape[1] == geometry.squares(*size)


def test_anyres_grids_follow_the_resolution() -> None:
    assert anyres_pinpoints(336) == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@pytest.mark.parametrize("tie", [False, True])
def test_the_language_model_is_unchanged(tmp_path, tie) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    llm_folder = write_toy_llm(tmp_path / "llm", tie=tie)
    tiny.write_model(llm_folder, tmp_path / "model")
    built = tiny.build_tiny(llm_folder)
    stored = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert (stored.lm_head.weight is stored.get_input_embeddings().weight) == tie
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        alone = AutoModelForCausalLM.from_pretrained(llm_folder)(ids).logits
        inside = built.model(ids).logits
    # One row more: the image token's.
    torch.testing.assert_close(inside[..., : alone.shape[-1]], alone)
    assert inside.shape[-1] == alone.shape[-1] + 1


def test_a_language_model_to_train_from_scratch(tmp_path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    texts = [f"How many {thing}?" for thing in ("umbrellas", "wolves", "keys")]
    folder = write_small_llm(tmp_path / "llm", texts, width=64, depth=1)
    # Words of the texts are one token each, any other text is still readable, and the template's marks are tokens.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("How many wolves?<|im_end|>") == ["How", "Ġmany", "Ġwolves", "?", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("naïve ☂").input_ids) == "naïve ☂"
    # Initial values of one over the root of the width, not the usual 0.02.
    weights = load_llm(folder).model.state_dict()
    assert weights["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.125, rel=0.05)
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_attention_heads, config.num_hidden_layers) == (2, 1)
    again = load_llm(write_small_llm(tmp_path / "again", texts, width=64, depth=1)).model.state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    with pytest.raises(OpenVisionError, match="width 40 of a language model is no multiple of 32"):
        write_small_llm(tmp_path / "odd", texts, width=40)


def test_answers_stop_where_the_template_stops(llm_folder) -> None:
    built = tiny.build_tiny(llm_folder)
    end = built.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in built.model.generation_config.eos_token_id
    assert built.model.generation_config.suppress_tokens == [built.model.config.image_token_id]


def test_the_projector_is_drawn_from_the_seed(llm_folder) -> None:
    def drawn(seed):
        built = assemble(tiny.tiny_tower(), load_llm(llm_folder), BuildOptions(seed=seed, framework="llava-next"))
        return torch.cat(
            [built.model.model.multi_modal_projector.linear_1.weight.flatten(), built.model.model.image_newline]
        )

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


TEMPLATES = {
    "no_stop": ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                "{% if add_generation_prompt %}assistant: {% endif %}", "never learn to stop"),
    "no_prompt": ("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
                  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "prompt followed by the answer"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"pad": None}, "no pad token"),
        ({"template": None}, "no chat template"),
        *(({"template": template}, message) for template, message in TEMPLATES.values()),
    ],
)
def test_tokenizers_that_cannot_be_trained_on(tmp_path, tokenizer, message) -> None:
    write_toy_llm(tmp_path / "llm", **tokenizer)
    with pytest.raises(OpenVisionError, match=message):
        load_llm(tmp_path / "llm")


def test_what_a_tokenizer_lacks_can_be_given(tmp_path) -> None:
    write_toy_llm(tmp_path / "llm", pad=None, template=None)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    loaded = load_llm(tmp_path / "llm", TokenizerOptions("<pad>", tmp_path / "chat.jinja"))
    assert loaded.tokenizer.pad_token == "<pad>"
    with pytest.raises(OpenVisionError, match="is not a token"):
        load_llm(tmp_path / "llm", TokenizerOptions("<nothing>", tmp_path / "chat.jinja"))
    with pytest.raises(OpenVisionError, match="cannot be read"):
        load_llm(tmp_path / "llm", TokenizerOptions("<pad>", tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": {"height": 40, "width": 40}}, "crops images to 40 px, but the encoder takes 44 px"),
        ({"size": {"shortest_edge": 48}}, "resizes images to 48 px"),
    ],
)
def test_a_processor_for_another_resolution(model_folder, tmp_path, change, message) -> None:
    import shutil

    from openvision.multimodal.model.generate import load_assistant

    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(OpenVisionError, match=message):
        load_assistant(tmp_path / "model")


# The command.


def run(*arguments: object):
    return CliRunner().invoke(app, ["vlm", *(str(argument) for argument in arguments)])


def test_build_from_the_command_line(llm_folder, tmp_path) -> None:
    save_folder(tmp_path / "encoder", tiny.encoder().vision, None, "", {})
    arguments = ("build", "--encoder", tmp_path / "encoder", "--llm", llm_folder, "-o", tmp_path / "vlm")
    result = run(*arguments, "--framework", "llava-next")
    assert result.exit_code == 0, result.output
    assert "5 x 5 = 25 tokens a square, up to 135 an image in tiles" in result.output
    assert "not empty" in str(run(*arguments).exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--framework", "blip"), "unknown framework 'blip'"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--llm", "./no/such"), "no/such does not exist"),
        (("--llm", "no.gguf"), "language model no.gguf does not exist"),
        (("--encoder", "openvision-vit-hugh-patch14-224"), "did you mean"),
        (("--feature-layer", "9"), "feature layer 9 does not exist"),
    ],
)
def test_bad_input(llm_folder, tmp_path, arguments, message) -> None:
    save_folder(tmp_path / "encoder", tiny.encoder().vision, None, "", {})
    given = {"--encoder": tmp_path / "encoder", "--llm": llm_folder, "-o": tmp_path / "vlm"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    result = run("build", *(part for pair in given.items() for part in pair))
    assert isinstance(result.exception, OpenVisionError)
    assert message in str(result.exception)
    assert not (tmp_path / "vlm").exists()


def test_the_shape_decides_not_the_name() -> None:
    geometry = Geometry(384, 14, 1, 1152, 27)
    # 27 patches fill 378 of 384 pixels.
    assert (geometry.grid, geometry.patches, geometry.tower_tokens) == (27, 729, 730)
    assert VisionConfig(8, 1, 8, 1, 14, 384).grid() == (27, 27)

"""OpenVision 3's model: the released demo's path, and the paper's shapes and sizes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

import openvision
from openvision.errors import OpenVisionError
from openvision.frozen.autoencoder import open_autoencoder
from openvision.frozen.config import AutoencoderConfig
from openvision.frozen.conv import ConvAutoencoder, ConvConfig, save_conv
from openvision.models.layers import sincos_position_table
from openvision.models.openvision2 import build_model
from openvision.models.openvision3 import (
    DEMO_AUTOENCODER,
    LatentVisionConfig,
    OpenVision3,
    OpenVision3Config,
    build_vision,
)
from openvision.models.vision import VisionConfig
from openvision.recipe.schema import load_recipe
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from openvision.weights.load import load_checkpoint
from openvision.weights.open_clip import CONFIG_FILE
from openvision.weights.registry import available_models, released
from tests.released import vision_shapes
from tests.stock_autoencoder import kl
from tests.training.small_step import recipe_of

RECIPES = Path(__file__).parents[2] / "recipes" / "openvision3"
PIXELS = AutoencoderConfig("pixels", None, 192, 8, 1.0)
# Width and depth of a released size, so that the tensors alone say how many heads there are.
DEMO = LatentVisionConfig(192, 12, 96, 3, 16, 32, autoencoder=DEMO_AUTOENCODER)


def small() -> OpenVision3Config:
    config = recipe_of("openvision3").model
    assert isinstance(config, OpenVision3Config)
    return config


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory) -> Path:
    """A small autoencoder in FLUX.1's layout: 16 channels at 1/8, no quant convolutions, a shift that is not used."""
    folder = tmp_path_factory.mktemp("kl")
    torch.manual_seed(0)
    kl().save_pretrained(folder)
    return folder


def released_file(head: bool) -> dict[str, torch.Tensor]:
    """A vision tower in the layout of the released files, random."""
    shapes = {**vision_shapes(DEMO, 24), "conv1.weight": (192, 16, 2, 2)}
    if not head:
        del shapes["proj"]
    generator = torch.Generator().manual_seed(1)
    state = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["positional_embedding"] = torch.cat([torch.zeros(1, 192), sincos_position_table(2, 2, 192)])
    return state


def stock_tokens(state: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """Patch tokens of the last block by transformers' ViT, which knows nothing of this project."""
    model = ViTModel(
        ViTConfig(
            hidden_size=192,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=96,
            image_size=4,
            patch_size=2,
            num_channels=16,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        embeddings = model.embeddings
        embeddings.cls_token.copy_(state["class_embedding"].view(1, 1, -1))
        embeddings.position_embeddings.copy_(state["positional_embedding"][None])
        embeddings.patch_embeddings.projection.weight.copy_(state["conv1.weight"])
        bias = embeddings.patch_embeddings.projection.bias
        assert bias is not None
        bias.zero_()
        named = dict(model.named_parameters())
        for index in range(12):
            ours = f"transformer.resblocks.{index}"
            theirs = next(name for name in named if f"layer.{index}." in name or f"layers.{index}." in name)
            prefix = theirs[: theirs.index(f".{index}.") + len(f".{index}.")]
            inside = {name.removeprefix(prefix): p for name, p in named.items() if name.startswith(prefix)}
            for kind in ("weight", "bias"):
                parts = state[f"{ours}.attn.in_proj_{kind}"].chunk(3)
                for names, part in zip(
                    (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")), parts, strict=True
                ):
                    _only(inside, kind, *names).copy_(part)
                _only(inside, kind, "attention.output.dense", "o_proj").copy_(state[f"{ours}.attn.out_proj.{kind}"])
                _only(inside, kind, "layernorm_before").copy_(state[f"{ours}.ln_1.{kind}"])
                _only(inside, kind, "layernorm_after").copy_(state[f"{ours}.ln_2.{kind}"])
                _only(inside, kind, "intermediate.dense", "fc1").copy_(state[f"{ours}.mlp.c_fc.{kind}"])
                _only(inside, kind, "output.dense", "fc2", without="attention").copy_(
                    state[f"{ours}.mlp.c_proj.{kind}"]
                )
        states = model(latents, output_hidden_states=True).hidden_states
    return states[-1][:, 1:]


def _only(inside: dict[str, torch.nn.Parameter], kind: str, *names: str, without: str = "\0") -> torch.nn.Parameter:
    found = [
        parameter
        for name, parameter in inside.items()
        if name.endswith(kind) and any(f"{each}.{kind}" in name for each in names) and without not in name
    ]
    assert len(found) == 1, (names, list(inside))
    return found[0]


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("with_config", [True, False])
def test_the_released_demos_path_on_random_weights_in_its_layout(head, with_config, kl_folder, tmp_path):
    state = released_file(head)
    save_file(state, tmp_path / "open_clip_model.safetensors")
    if with_config:
        vision = {"width": 192, "layers": 12, "head_width": 64, "patch_size": 2, "image_size": 4, "in_channels": 16}
        (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_cfg": {"embed_dim": 24, "vision_cfg": vision}}))
    source = tmp_path if with_config else tmp_path / "open_clip_model.safetensors"
    encoder = openvision.load_vision(source, autoencoder=kl_folder)
    assert encoder.vision.config == replace(DEMO, autoencoder=replace(DEMO_AUTOENCODER, source=str(kl_folder)))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    # What the demo does: the mean of the posterior times the scale, then the tower.
    stock: Any = AutoencoderKL.from_pretrained(kl_folder)
    with torch.no_grad():
        posterior = stock.encode(images.float() / 127.5 - 1).latent_dist
        expected = stock_tokens(state, posterior.mean * stock.config.scaling_factor)
        found = encoder.forward_features(images)
    assert found.grid == (2, 2)
    torch.testing.assert_close(found.patch_tokens, expected, rtol=1e-4, atol=1e-4)
    assert (encoder.vision.head is not None) == head


def test_a_released_file_that_lacks_a_tensor_is_refused(tmp_path):
    state = released_file(head=True)
    del state["transformer.resblocks.3.mlp.c_fc.bias"]
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(OpenVisionError, match=r"blocks.3.mlp.fc1.bias is missing"):
        openvision.load_vision(tmp_path / "weights.safetensors")


def test_the_released_names_and_their_sizes():
    names = [name for name in available_models() if name.startswith("openvision3-")]
    assert names == [
        "openvision3-vit-base-patch2-32",
        "openvision3-vit-base-patch2-28",
        "openvision3-vit-large-patch2-32",
    ]
    shapes = {name: released(name) for name in names}
    assert {name: (entry.vision.image_size, entry.tokens, entry.parameters) for name, entry in shapes.items()} == {
        names[0]: (256, 256, 85_499_136),
        names[1]: (224, 196, 85_499_136),
        names[2]: (256, 256, 303_164_416),
    }


@pytest.mark.parametrize(("name", "branch"), [("b2", 85.7), ("l2", 85.9)])
def test_the_recipes_have_the_papers_sizes_and_stages(name, branch):
    recipe = load_recipe(RECIPES / f"{name}.toml")
    with torch.device("meta"):
        model = build_model(recipe.model)
    assert isinstance(model, OpenVision3)
    entry = released("openvision3-vit-base-patch2-32" if name == "b2" else "openvision3-vit-large-patch2-32")
    assert sum(p.numel() for p in model.vision.parameters()) == entry.parameters
    assert sum(p.numel() for p in model.reconstruction.parameters()) / 1e6 == pytest.approx(branch, abs=0.05)
    first, second = recipe.stages
    assert [round(stage.steps, -1) for stage in recipe.stages] == [625_570, 125_110]
    assert [stage.warmup_steps for stage in recipe.stages] == [6255, 6255]
    assert [stage.peak_learning_rate for stage in recipe.stages] == pytest.approx([2.56e-4, 6.4e-6])
    assert (first.perceptual, second.perceptual) == (None, 0.5)
    assert recipe.loss.reconstruction is not None
    assert (recipe.loss.reconstruction.weight, recipe.loss.reconstruction.latents) == (0.5, 0.4)


@pytest.mark.parametrize(("resolution", "tokens"), [(128, 64), (224, 196), (256, 256)])
def test_tokens_and_latents_of_every_stage(resolution, tokens):
    config = replace(small(), vision=LatentVisionConfig(32, 1, 48, 2, 16, resolution, autoencoder=PIXELS))
    model = OpenVision3(config)
    images = torch.randint(0, 256, (1, 3, resolution, resolution), dtype=torch.uint8)
    ids = torch.ones(1, 9, dtype=torch.long)
    output = model(images, torch.ones(1, 7, dtype=torch.long), input_ids=ids)
    assert model.vision.patch_tokens(images).shape == (1, tokens, 32)
    assert output.latents.shape == output.predicted.shape == (1, 192, resolution // 8, resolution // 8)
    assert model.reconstruct(images).shape == (1, 3, resolution, resolution)


def test_without_an_autoencoder_it_is_a_tower_of_patch_16_on_pixels():
    """The paper's "without VAE": rearranging pixels and patches of 2 are patches of 16, weight by weight."""
    latent = build_vision(LatentVisionConfig(32, 2, 48, 2, 16, 32, autoencoder=PIXELS), 8)
    pixels = build_vision(pixel_config(), 8)
    with torch.no_grad():
        for name, parameter in pixels.named_parameters():
            if name != "patch_embed.proj.weight":
                parameter.copy_(dict(latent.named_parameters())[name])
        # (D, 3 * 8 * 8, 2, 2) -> (D, 3, 16, 16): row and column of a pixel are 8 * patch + place.
        weight = latent.patch_embed.proj.weight.view(32, 3, 8, 8, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(32, 3, 16, 16)
        pixels.patch_embed.proj.weight.copy_(weight)
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        torch.testing.assert_close(latent(images), pixels(images.float() / 127.5 - 1), rtol=1e-4, atol=1e-5)


def pixel_config() -> VisionConfig:
    return VisionConfig(32, 2, 48, 2, 16, 32)


def test_noise_changes_what_is_reconstructed_and_nothing_that_is_understood():
    model = OpenVision3(small())
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    text, ids = torch.ones(3, 7, dtype=torch.long), torch.ones(3, 9, dtype=torch.long)
    noise = torch.randn(3, 16, 32)
    plain, noisy = (model(images, text, input_ids=ids, noise=each) for each in (None, noise))
    assert torch.equal(plain.image_embeds, noisy.image_embeds)
    assert torch.equal(plain.caption_states, noisy.caption_states)
    assert not torch.equal(plain.predicted, noisy.predicted)
    relative = OpenVision3(replace(small(), reconstruction=replace(small().reconstruction, noise_relative=True)))
    relative.load_state_dict(model.state_dict())
    scaled = noise * plain.token_rms[:, None, None]
    torch.testing.assert_close(
        relative(images, text, input_ids=ids, noise=noise).predicted,
        model(images, text, input_ids=ids, noise=scaled).predicted,
    )


def test_a_model_folder_brings_its_own_autoencoder_along(tmp_path):
    torch.manual_seed(0)
    save_conv(tmp_path / "ae", ConvAutoencoder(ConvConfig(widths=(8, 8, 8))), 1.5, {})
    config = small()
    autoencoder = AutoencoderConfig("conv", str(tmp_path / "ae"), scale=1.5)
    config = replace(config, vision=LatentVisionConfig(32, 2, 48, 2, 16, 32, autoencoder=autoencoder))
    model = OpenVision3(config).eval()
    tokenizer = Tokenizer.train(["a red square", "a blue bar"], 40)
    save_folder(tmp_path / "model", model, tokenizer, "", {})
    (tmp_path / "ae" / "model.safetensors").unlink()
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.unified is not None
    assert loaded.unified.config.vision.autoencoder.source == str(tmp_path / "model" / "autoencoder")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert loaded.unified.reconstruct(images).shape == images.shape
        tower = openvision.load_vision(tmp_path / "model")
        assert torch.equal(tower.forward_features(images).patch_tokens, loaded.vision.patch_tokens(images))
    encoder = openvision.load(tmp_path / "model")
    assert encoder.encode_texts(["a red square"]).shape == (1, 16)
    assert len(openvision.load_captioner(tmp_path / "model").caption([images[0].permute(1, 2, 0).numpy()])) == 1
    with pytest.raises(OpenVisionError, match="sees pixels and has no autoencoder"):
        plain = build_vision(pixel_config(), 8)
        save_folder(tmp_path / "plain", plain, None, "", {})
        openvision.load_vision(tmp_path / "plain", autoencoder=tmp_path / "ae")


def test_the_reconstruction_is_initialised_by_width_where_the_configuration_says_so():
    config = load_recipe(RECIPES / "scenes.toml", []).model
    assert isinstance(config, OpenVision3Config)
    torch.manual_seed(0)
    published = OpenVision3(replace(config, reconstruction=replace(config.reconstruction, init="published")))
    by_width, fixed = (model.reconstruction.state_dict() for model in (OpenVision3(config), published))
    for name, width in (
        ("proj.weight", config.vision.width),
        ("blocks.0.attn.qkv.weight", config.reconstruction.width),
    ):
        assert by_width[name].std().item() == pytest.approx(width**-0.5, rel=0.05)
        assert fixed[name].std().item() == pytest.approx(0.02, rel=0.05)
    # Folders of the published form are read by older versions, which know no other.
    assert "init" not in published.config.to_dict()["reconstruction"]
    assert OpenVision3Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"patch_size": 12}, "patch_size 12 px is no whole number of latents of 8 px"),
        ({"image_size": 40}, "image_size 40 px is no whole number of patches of 16 px"),
    ],
)
def test_resolutions_that_latents_do_not_divide_are_refused(vision, message):
    with pytest.raises(ValueError, match=message):
        LatentVisionConfig(
            **{"width": 32, "depth": 1, "mlp_dim": 48, "heads": 2, "patch_size": 16, "image_size": 32} | vision,
            autoencoder=PIXELS,
        )


def test_the_configuration_survives_its_file():
    assert OpenVision3Config.from_dict(json.loads(json.dumps(small().to_dict()))) == small()
    assert open_autoencoder(small().vision.autoencoder).config.kind == "pixels"

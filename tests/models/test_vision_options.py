"""Registers and the attention pool of a vision tower: off they are not there, on every path knows them."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.models.flops import vision_flops
from openvision.models.layers import unit
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import OpenVision2Config
from openvision.models.text import TextConfig
from openvision.models.variants import variant2
from openvision.models.vision import MaskedPatches, VisionConfig, VisionTransformer
from openvision.recipe.sections import WarmStart
from openvision.text.tokenizer import Tokenizer
from openvision.training.setup.start import start_from
from openvision.weights.export.targets import PUBLISHED_ONLY, ExportOptions, export
from openvision.weights.folder import load_folder, load_vision_folder, save_folder
from openvision.weights.load import Checkpoint
from tests.planning.conftest import count, meta

__all__ = ["meta"]

PLAIN = VisionConfig(width=32, depth=2, mlp_dim=64, heads=2, patch_size=8, image_size=32)
OPTIONS = [
    replace(PLAIN, registers=3),
    replace(PLAIN, pool="map"),
    replace(PLAIN, registers=4, pool="map"),
]
IMAGES = torch.randint(0, 256, (3, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tower(config: VisionConfig, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(config, 16)


def whole(config: VisionConfig) -> OpenVision:
    torch.manual_seed(0)
    text = TextConfig(width=32, depth=1, mlp_dim=64, heads=2, vocab_size=120, context_length=12)
    return OpenVision(OpenVisionConfig(embed_dim=16, vision=config, text=text)).eval()


def as_written(tower: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens and pooled vector from the definitions, token by token."""
    config = tower.config
    rows, columns = config.grid(*images.shape[-2:])
    patches = tower.patch_embed(tower.inputs(images)) + tower.position_table(rows, columns, images.device)
    registers = [] if tower.reg_token is None else [tower.reg_token.expand(len(images), -1, -1)]
    x = torch.cat([tower.cls_token.expand(len(images), -1, -1), *registers, patches], dim=1)
    for block in tower.blocks:
        x = block(x)
    tokens = x[:, 1 + config.registers :]
    if tower.attn_pool is None:
        return tokens, tower.fc_norm(tokens.mean(dim=1))
    pool, normed = tower.attn_pool, tower.fc_norm(tokens)
    stock = torch.nn.MultiheadAttention(config.width, config.heads, batch_first=True)
    with torch.no_grad():
        stock.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
        stock.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
        stock.out_proj.weight.copy_(pool.proj.weight)
        stock.out_proj.bias.copy_(pool.proj.bias)
    found = stock(pool.latent.expand(len(images), -1, -1), normed, normed)[0][:, 0]
    return tokens, found + pool.mlp(pool.norm(found))


@pytest.mark.parametrize("config", OPTIONS)
def test_outputs_are_those_of_the_definition(config) -> None:
    ours = tower(config)
    with torch.inference_mode():
        tokens, pooled = as_written(ours, IMAGES)
        features = ours.forward_features(IMAGES, layers=[-1])
        assert features.num_prefix_tokens == 1 + config.registers
        for found in (features.patch_tokens, features.layers[0].patch_tokens, ours.patch_tokens(IMAGES)):
            assert found.shape == (3, 20, 32)
            torch.testing.assert_close(found, tokens)
        torch.testing.assert_close(features.pooled, pooled)
        keep = torch.tensor([[1, 4], [0, 19], [7, 8]])
        kept = ours.patch_tokens(IMAGES, keep)
        torch.testing.assert_close(kept, tokens.gather(1, keep[..., None].expand(-1, -1, 32)))


def test_without_options_there_is_nothing_of_them() -> None:
    assert not [name for name in tower(PLAIN).state_dict() if "reg_token" in name or "attn_pool" in name]
    assert PLAIN.is_published
    assert PLAIN.to_dict().keys() == {"width", "depth", "mlp_dim", "heads", "patch_size", "image_size"}


def test_registers_change_no_other_initial_parameter() -> None:
    plain, with_options = tower(PLAIN).state_dict(), tower(OPTIONS[0]).state_dict()
    assert all(torch.equal(with_options[name], tensor) for name, tensor in plain.items())


def test_one_patch_alone_is_in_the_space_of_texts() -> None:
    ours = tower(OPTIONS[1])
    with torch.inference_mode():
        tokens = ours.patch_tokens(IMAGES)
        alone = unit(ours.project(ours.pool(tokens[:1, 5:6])))
        assert ours.embed_patches(tokens).shape == (3, 20, 16)
        torch.testing.assert_close(ours.embed_patches(tokens)[0, 5], alone[0])


def test_a_masked_patch_is_not_seen() -> None:
    ours = tower(OPTIONS[0])
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[:, 0] = True
    changed = IMAGES.clone()
    changed[..., :8, :8] = 255 - changed[..., :8, :8]
    masked = MaskedPatches(mask, torch.randn(32))
    with torch.inference_mode():
        assert torch.equal(ours.patch_tokens(IMAGES, masked=masked), ours.patch_tokens(changed, masked=masked))
        assert not torch.equal(ours.patch_tokens(IMAGES), ours.patch_tokens(changed))


@pytest.mark.parametrize("config", OPTIONS)
def test_flops_are_those_that_are_counted(meta, config) -> None:
    assert count(VisionTransformer(config, 16), torch.zeros(1, 3, 32, 32)) == vision_flops(config, 32, 16)


@pytest.mark.parametrize("config", OPTIONS)
def test_a_folder_gives_the_same_model_back(config, tmp_path) -> None:
    model = whole(config)
    save_folder(tmp_path / "model", model, Tokenizer.train(["a red circle"], 100), "", {})
    loaded, _, _ = load_folder(tmp_path / "model")
    assert loaded.config == model.config
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_image(IMAGES), model.encode_image(IMAGES))
        torch.testing.assert_close(load_vision_folder(tmp_path / "model")(IMAGES), model.vision(IMAGES))


def test_exports_hold_them_or_say_that_they_cannot(tmp_path) -> None:
    vision = tower(OPTIONS[2]).eval()
    checkpoint = Checkpoint(vision, None, None, "test", {})
    results = export(checkpoint, "onnx", tmp_path / "onnx")
    assert results
    assert all(result.passed for result in results)
    for target in PUBLISHED_ONLY:
        with pytest.raises(OpenVisionError, match="export it with --to timm, onnx or safetensors"):
            export(checkpoint, target, tmp_path / target, ExportOptions(accept_drift=True))
        assert not (tmp_path / target).exists()


def test_a_start_without_them_leaves_them_fresh(tmp_path) -> None:
    save_folder(tmp_path / "start", tower(PLAIN, seed=1), None, "", {})
    model, notes = whole(OPTIONS[2]), list[str]()
    fresh = {name: tensor.clone() for name, tensor in model.vision.state_dict().items()}
    start_from(model, str(tmp_path / "start"), WarmStart(), None, notes.append)
    state, given = model.vision.state_dict(), tower(PLAIN, seed=1).state_dict()
    assert notes == ["vision: attn_pool and reg_token initialised at random"]
    assert all(torch.equal(state[name], given.get(name, fresh[name])) for name in state)
    save_folder(tmp_path / "more", tower(OPTIONS[0]), None, "", {})
    with pytest.raises(OpenVisionError, match="registers 3, not 0"):
        start_from(whole(PLAIN), str(tmp_path / "more"), WarmStart())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"registers": -1}, "registers must be an integer"), ({"pool": "cls"}, 'must be "mean" or "map"')],
)
def test_wrong_values_are_named(wrong, message) -> None:
    with pytest.raises((ValueError, ValidationError), match=message):
        replace(PLAIN, **wrong)


def test_a_model_that_only_captions_has_no_pooled_vector_to_train() -> None:
    config = variant2("tiny", 16, 160)
    with pytest.raises(ValueError, match="OpenVision 2 trains no pooled vector"):
        OpenVision2Config(replace(config.vision, pool="map"), config.decoder)

"""What a builder of multimodal models asks of a tower, and pictures of every awkward kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.images.preprocess import resize_center_crop, squash
from openvision.inference.encoder import Encoder
from openvision.inference.vision import VisionEncoder
from openvision.models.vision import VisionConfig, VisionTransformer, normalize

PIXELS = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)


@pytest.fixture
def tower() -> VisionEncoder:
    torch.manual_seed(0)
    config = VisionConfig(width=32, depth=3, mlp_dim=64, heads=2, patch_size=14, image_size=56)
    return VisionEncoder(VisionTransformer(config, 16))


def test_what_forward_features_gives(tower) -> None:
    images = torch.randn(2, 3, 56, 56)
    features = tower.forward_features(images, layers=[-2, 0, 3])
    assert features.grid == tower.grid == (4, 4)
    assert features.num_prefix_tokens == 1
    assert [tuple(layer.patch_tokens.shape) for layer in features.layers] == [(2, 16, 32)] * 3
    assert [tuple(layer.class_token.shape) for layer in features.layers] == [(2, 32)] * 3
    assert torch.equal(features.layers[2].patch_tokens, features.patch_tokens)
    penultimate = tower.vision.blocks[2](
        torch.cat([features.layers[0].class_token[:, None], features.layers[0].patch_tokens], 1)
    )
    assert torch.allclose(penultimate[:, 1:], features.patch_tokens, atol=1e-6)
    assert torch.allclose(features.pooled, tower.vision.fc_norm(features.patch_tokens.mean(1)))


def test_norm_is_applied_to_the_layers_and_to_nothing_else(tower) -> None:
    images = torch.randn(1, 3, 56, 56)
    plain, normed = (tower.forward_features(images, layers=[-1], norm=norm) for norm in (False, True))
    assert torch.equal(plain.patch_tokens, normed.patch_tokens)
    expected = tower.vision.fc_norm(plain.layers[0].patch_tokens)
    assert torch.equal(expected, normed.layers[0].patch_tokens)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there(tower, layer) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} does not exist"):
        tower.forward_features(torch.zeros(1, 3, 56, 56), layers=[layer])


def test_384_pixels_at_patch_14_give_27_by_27(tower) -> None:
    larger = VisionEncoder(tower.vision, resolution=384)
    assert larger.grid == (27, 27)
    assert larger.num_patches == 729
    assert larger.forward_features([PIXELS]).patch_tokens.shape == (1, 729, 32)


def test_pictures_uint8_and_normalised_tensors_are_the_same(tower) -> None:
    prepared = tower.preprocess_all([PIXELS])
    wanted = tower.forward_features([PIXELS]).patch_tokens
    assert torch.equal(tower.forward_features(prepared).patch_tokens, wanted)
    assert torch.equal(tower.forward_features(normalize(prepared)).patch_tokens, wanted)


def test_gradients_flow(tower) -> None:
    images = torch.randn(1, 3, 56, 56, requires_grad=True)
    tower.forward_features(images, layers=[-2]).layers[0].patch_tokens.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_bfloat16_weights(tower) -> None:
    images = torch.randn(2, 3, 56, 56)
    exact = tower.forward_features(images, layers=[-2])
    half = tower.to(dtype=torch.bfloat16).forward_features(images, layers=[-2])
    assert half.layers[0].patch_tokens.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(half.layers[0].patch_tokens.float(), exact.layers[0].patch_tokens, dim=-1)
    assert cosine.min() > 0.999
    assert tower.encode_images([PIXELS]).dtype == torch.float32


def test_whole_models_in_bfloat16(encoder) -> None:
    exact = encoder.encode_texts(["a red picture"])
    assert (
        torch.cosine_similarity(encoder.to(dtype=torch.bfloat16).encode_texts(["a red picture"]), exact).item() > 0.99
    )


# tests/models/test_compile.py compiles the tower in every run of the tests.
@pytest.mark.slow
def test_compiled_as_one_graph(tower) -> None:
    # A frozen tower; the graph with a backward pass is that of tests/models/test_compile.py.
    tower.vision.requires_grad_(False)
    compiled = torch.compile(tower.vision.forward_features, fullgraph=True, backend="aot_eager")
    for side in (56, 28):
        images = torch.randn(1, 3, side, side)
        expected = tower.vision.forward_features(images, layers=[-2])
        found = compiled(images, layers=[-2])
        assert found.grid == expected.grid
        assert torch.allclose(found.layers[0].patch_tokens, expected.layers[0].patch_tokens, atol=1e-5)


def test_preprocessing_both_ways(tower) -> None:
    squashing = VisionEncoder(tower.vision, preprocessing="squash")
    assert np.array_equal(tower.preprocess(PIXELS).permute(1, 2, 0).numpy(), resize_center_crop(PIXELS, 56))
    assert np.array_equal(squashing.preprocess(PIXELS).permute(1, 2, 0).numpy(), squash(PIXELS, 56))


def test_rectangles(tower) -> None:
    wide = VisionEncoder(tower.vision, resolution=(28, 70))
    assert wide.preprocess(PIXELS).shape == (3, 28, 70)
    assert wide.grid == (2, 5)
    assert np.array_equal(resize_center_crop(PIXELS, (56, 56)), resize_center_crop(PIXELS, 56))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "I;16", "YCbCr"])
def test_every_mode_of_picture(tower, tmp_path, mode) -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "YCbCr", "I;16") else "picture.png")
    image.save(path)
    vector = tower.encode_images([path])
    reference = tower.encode_images([np.repeat(PIXELS[..., :1], 3, axis=2)])
    # One bit a pixel is dithered: another picture.
    assert torch.cosine_similarity(vector, reference).item() > (0.5 if mode == "1" else 0.999)


def test_exif_rotation(tower, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(tower.preprocess(tmp_path / "turned.png"), tower.preprocess(PIXELS))


def test_the_smallest_and_the_largest_picture(tower, tmp_path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    assert tower.encode_images([tmp_path / "one.png"]).shape == (1, 16)
    Image.new("1", (30_000, 30_000)).save(tmp_path / "huge.png")
    with pytest.raises(OpenVisionError, match=r"huge\.png cannot be used: .*900000000 pixels"):
        tower.encode_images([tmp_path / "huge.png"])


def test_a_resolution_below_a_patch(tower) -> None:
    with pytest.raises(OpenVisionError, match="smaller than a patch"):
        VisionEncoder(tower.vision, resolution=13)


def test_one_picture_where_a_list_is_meant(tower) -> None:
    with pytest.raises(OpenVisionError, match="expected a list"):
        tower.encode_images("cat.png")


def test_an_encoder_is_a_vision_encoder(encoder) -> None:
    assert isinstance(encoder, Encoder)
    features = encoder.forward_features([PIXELS], layers=[-1])
    assert features.grid == (4, 4)

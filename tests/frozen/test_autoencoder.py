"""Autoencoders: frozen, strict about their shape, and as costly as planned."""

import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from openvision.errors import OpenVisionError
from openvision.frozen.autoencoder import FromDiffusers, as_signed, as_uint8, open_autoencoder
from openvision.frozen.config import AutoencoderConfig, Kind
from openvision.frozen.conv import ConvAutoencoder, ConvConfig, save_conv
from openvision.frozen.cost import FLUX_BLOCKS, FLUX_WIDTHS, autoencoder_cost
from openvision.planning.memory import Setting
from tests.planning.conftest import count
from tests.stock_autoencoder import kl

PIXELS = AutoencoderConfig("pixels", None, 192, 8, 1.0)


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    torch.manual_seed(0)
    kl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conv_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conv") / "ae"
    torch.manual_seed(0)
    save_conv(folder, ConvAutoencoder(ConvConfig(widths=(8, 8, 16))), 2.0, {"steps": 0})
    return folder


@pytest.mark.parametrize("resolution", [64, 128])
def test_the_cost_is_what_torch_counts(resolution):
    with torch.device("meta"):
        own = ConvAutoencoder(ConvConfig())
        flux = kl(FLUX_WIDTHS, FLUX_BLOCKS, 32)
        images = torch.empty(1, 3, resolution, resolution)
    assert [sum(p.numel() for p in half.parameters()) for half in (flux.encoder, flux.decoder)] == [34274208, 49545475]
    networks: dict[Kind, FromDiffusers | ConvAutoencoder] = {"diffusers": FromDiffusers(flux), "conv": own}
    for kind, network in networks.items():
        cost = autoencoder_cost(AutoencoderConfig(kind, "somewhere"), resolution)
        latents = torch.empty(1, 16, resolution // 8, resolution // 8, device="meta")
        assert count(network.encode, images) == cost.encode
        assert count(network.decode, latents) == cost.decode


@pytest.mark.parametrize("kind", ["diffusers", "conv"])
def test_memory_of_the_decoder_is_within_a_third_of_what_autograd_keeps(kind):
    network = FromDiffusers(kl(FLUX_WIDTHS, FLUX_BLOCKS, 32)) if kind == "diffusers" else ConvAutoencoder(ConvConfig())
    network.requires_grad_(False)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoded = network.decode(torch.randn(1, 16, 8, 8, requires_grad=True))
    assert decoded.shape == (1, 3, 64, 64)
    planned = autoencoder_cost(AutoencoderConfig(kind, "somewhere"), 64).decoder_activations
    assert planned * Setting(bf16=False).item == pytest.approx(sum(kept.values()), rel=0.34)


def test_the_adapter_scales_the_mean_and_shifts_nothing(kl_folder):
    config = AutoencoderConfig(source=str(kl_folder))
    autoencoder = open_autoencoder(config)
    stock: Any = AutoencoderKL.from_pretrained(kl_folder)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    latents = autoencoder.encode(images)
    with torch.no_grad():
        expected = 0.3611 * stock.encode(images.float() / 127.5 - 1).latent_dist.mean
        decoded = stock.decode(expected / 0.3611).sample
    assert latents.shape == (2, 16, 4, 6)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(autoencoder.decode(latents), decoded)


def test_pixels_are_kept_exactly():
    autoencoder = open_autoencoder(PIXELS)
    images = torch.randint(0, 256, (2, 3, 32, 16), dtype=torch.uint8)
    latents = autoencoder.encode(images)
    assert latents.shape == (2, 192, 4, 2)
    assert torch.equal(as_uint8(autoencoder.decode(latents)), images)


def test_gradients_go_through_and_leave_the_autoencoder_as_it_is(conv_folder):
    autoencoder = open_autoencoder(AutoencoderConfig("conv", str(conv_folder), scale=2.0))
    before = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    latents = autoencoder.encode(torch.rand(2, 3, 16, 16)).requires_grad_()
    autoencoder.train().decode(latents).square().mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0
    assert not any(module.training for module in autoencoder.network.modules())
    assert all(parameter.grad is None for parameter in autoencoder.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in autoencoder.state_dict().items())


def test_an_autoencoder_that_was_trained_again_is_read_again(conv_folder, tmp_path):
    folder = tmp_path / "ae"
    save_conv(folder, ConvAutoencoder(ConvConfig(widths=(8, 8))), 1.0, {})
    config = AutoencoderConfig("conv", str(folder), factor=4, scale=1.0)
    first = open_autoencoder(config)
    assert open_autoencoder(config) is first
    (folder / "model.safetensors").rename(folder / "old")
    (folder / "model.safetensors").write_bytes((folder / "old").read_bytes())
    assert open_autoencoder(config) is not first


def test_signed_pixels_there_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_uint8(as_signed(values)), values)
    assert as_signed(values).min() == -1
    assert as_signed(values).max() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 1.0}, "scale 2 instead of 1"),
        ({"channels": 8}, "channels 16 instead of 8"),
        ({"factor": 4}, "factor 8 instead of 4"),
        ({"source": "/nowhere/ae"}, "train one with `openvision autoencoder`"),
    ],
)
def test_another_autoencoder_is_refused(change, message, conv_folder):
    config = AutoencoderConfig(**{"kind": "conv", "source": str(conv_folder), "scale": 2.0, **change})
    with pytest.raises(OpenVisionError, match=message):
        open_autoencoder(config)


def test_what_is_no_autoencoder_is_refused(kl_folder, conv_folder, tmp_path):
    with pytest.raises(OpenVisionError, match=r"scale 0.3611 instead of 0.5"):
        open_autoencoder(AutoencoderConfig(source=str(kl_folder), scale=0.5))
    with pytest.raises(OpenVisionError, match="does not exist"):
        open_autoencoder(AutoencoderConfig(source="/nowhere"))
    with pytest.raises(OpenVisionError, match=r"has no config.json"):
        open_autoencoder(AutoencoderConfig(source=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"widths": [8], "colour": 1}))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(OpenVisionError, match="does not describe an autoencoder"):
        open_autoencoder(AutoencoderConfig("conv", str(tmp_path), scale=1.0))
    (tmp_path / "config.json").write_text((conv_folder / "config.json").read_text())
    with pytest.raises(OpenVisionError, match="cannot be read"):
        open_autoencoder(AutoencoderConfig("conv", str(tmp_path), scale=2.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "vqgan", "source": "x"}, "must be one of diffusers, conv, pixels"),
        ({"kind": "pixels", "source": "x"}, "has no source"),
        ({"kind": "conv"}, "needs a source"),
        ({"kind": "pixels", "channels": 16}, r"channels must be 192"),
        ({"source": "x", "scale": 0.0}, "must be above 0"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**settings)


def test_images_that_do_not_divide_into_latents_are_refused():
    with pytest.raises(ValueError, match="30 x 32 px do not divide into latents of 8 px"):
        open_autoencoder(PIXELS).encode(torch.zeros(1, 3, 30, 32))

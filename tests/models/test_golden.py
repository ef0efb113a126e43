"""Our model against numbers of the original implementation (spec sections 1 to 5)."""

import numpy as np
import pytest
import torch
from torch import Tensor

from openvision.models.decoders.parallel import DecoderConfig
from openvision.models.layers import sincos_position_table, unit
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.objectives.caption import caption_loss
from openvision.objectives.contrastive import contrastive_losses
from openvision.weights.jax import from_jax

TINY = OpenVisionConfig(
    embed_dim=16,
    vision=VisionConfig(width=24, depth=2, mlp_dim=96, heads=3, patch_size=8, image_size=32),
    text=TextConfig(width=32, depth=2, mlp_dim=64, heads=2, vocab_size=200, context_length=10),
    decoder=DecoderConfig(width=32, depth=2, mlp_dim=64, heads=2, vocab_size=200, caption_length=12),
)


def part(golden: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """The golden parameters or gradients, under our names."""
    return from_jax({name[len(prefix) :]: value for name, value in golden.items() if name.startswith(prefix)})


@pytest.fixture
def model(golden_tiny) -> OpenVision:
    model = OpenVision(TINY)
    model.load_state_dict(part(golden_tiny, "param:"))
    return model


@pytest.fixture
def images(golden_tiny) -> Tensor:
    return torch.from_numpy(golden_tiny["image_nhwc"]).permute(0, 3, 1, 2)


def ids(golden: dict[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(golden[name].astype(np.int64))


def assert_close(ours: Tensor, golden: np.ndarray, tolerance: float = 1e-5) -> None:
    assert ours.shape == golden.shape
    assert np.abs(ours.detach().numpy() - golden).max() <= tolerance


def test_position_table(golden_tiny):
    table = torch.cat([torch.zeros(1, 64), sincos_position_table(16, 16, 64)])
    assert_close(table, golden_tiny["posemb_16x16_64"], 2e-6)


def test_outputs(model, images, golden_tiny):
    alt, sentence = ids(golden_tiny, "labels1"), ids(golden_tiny, "labels2")
    features = model.vision.forward_features(images)
    assert_close(features.patch_tokens, golden_tiny["image_tokens"])
    # The golden embeddings are those that enter the loss: already of unit length.
    assert_close(model.encode_image(images), golden_tiny["zimg"])
    assert_close(model.encode_text(torch.cat([alt, sentence])), golden_tiny["ztxt"])
    assert_close(model.caption_logits(images, alt), golden_tiny["logits"])
    assert_close(model.caption_logits(images, alt), golden_tiny["eval_logits"])


def test_losses_and_every_gradient(model, images, golden_tiny):
    output = model(images, ids(golden_tiny, "labels1"), ids(golden_tiny, "labels2"))
    contrastive = contrastive_losses(output.image_embeds, output.text_embeds, output.scale).mean()
    labels, mask = ids(golden_tiny, "autoreg_labels"), ids(golden_tiny, "cap_loss_mask").bool()
    caption = caption_loss(output.caption_states, labels, mask, model.decoder.head.weight)
    total = contrastive + 2 * caption
    assert abs(contrastive.item() - golden_tiny["clip_loss"]) <= 1e-6
    assert abs(caption.item() - golden_tiny["caption_loss"]) <= 1e-6
    assert abs(total.item() - golden_tiny["total_loss"]) <= 3e-6

    total.backward()
    expected = part(golden_tiny, "grad:")
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (ours[name] - gradient).abs().max().item()
        assert error <= max(1e-4 * gradient.abs().max().item(), 1e-7), name


def test_unit_vectors(model, images):
    assert torch.allclose(model.encode_image(images).norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.equal(unit(torch.zeros(1, 4)), torch.zeros(1, 4))

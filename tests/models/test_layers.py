"""Attention is the same by both of its ways, and numbers hold under autocast."""

import pytest
import torch
import torch.nn.functional as F

from openvision.models.kernels import dispatch
from openvision.models.openvision import OpenVision
from openvision.models.variants import variant


@pytest.mark.parametrize("causal", [False, True])
def test_explicit_attention_equals_the_fused_kernel(causal, monkeypatch):
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 11, 11))
    explicit = dispatch.attention(q, k, v, causal)
    monkeypatch.setattr(dispatch, "EXPLICIT_KEYS_ON_CPU", 0)
    fused = dispatch.attention(q, k, v, causal)
    torch.testing.assert_close(explicit, fused, rtol=0, atol=1e-6)
    weights = torch.randn_like(fused)
    for one, other in zip(
        torch.autograd.grad(explicit, (q, k, v), weights), torch.autograd.grad(fused, (q, k, v), weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_the_last_query_sees_every_key_and_the_first_none_behind_itself():
    seen = dispatch.causal_mask(2, 5, torch.device("cpu"))
    assert seen.tolist() == [[True, True, True, True, False], [True, True, True, True, True]]


def test_long_sequences_take_the_fused_kernel(monkeypatch):
    called = []
    fused = F.scaled_dot_product_attention

    def spy(*arguments, **keywords):
        called.append(True)
        return fused(*arguments, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    short, long = torch.randn(1, 1, 16, 4), torch.randn(1, 1, dispatch.EXPLICIT_KEYS_ON_CPU + 1, 4)
    dispatch.attention(short, short, short)
    assert not called
    dispatch.attention(long, long, long)
    assert called


def test_bfloat16_autocast_stays_near_float32_and_embeddings_stay_float32():
    model = OpenVision(variant("tiny", 16, 64)).eval()
    images, ids = torch.randn(2, 3, 64, 64), torch.randint(0, 30000, (2, 80))
    with torch.no_grad():
        exact = model.encode_image(images), model.encode_text(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model.encode_image(images), model.encode_text(ids)
            tokens = model.vision.forward_features(images).patch_tokens
    assert tokens.dtype == torch.bfloat16
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32
        assert F.cosine_similarity(one, other).min() > 0.999


def test_images_that_do_not_fill_the_grid_lose_their_rest():
    model = OpenVision(variant("tiny", 16, 64)).vision.eval()
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        whole, cut = model.forward_features(images), model.forward_features(images[..., :64, :80])
    assert whole.patch_tokens.shape == (1, 4 * 5, 192)
    assert torch.equal(whole.patch_tokens, cut.patch_tokens)


def test_image_smaller_than_a_patch():
    model = OpenVision(variant("tiny", 16, 64)).vision
    with pytest.raises(ValueError, match="smaller than a patch"):
        model(torch.randn(1, 3, 8, 64))


def test_text_of_another_length():
    model = OpenVision(variant("tiny", 16, 64)).text
    with pytest.raises(ValueError, match="reads exactly 80"):
        model(torch.zeros(1, 79, dtype=torch.int64))

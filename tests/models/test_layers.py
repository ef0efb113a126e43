"""Attention is the same by both of its ways, and numbers hold under autocast."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from openvision.models.kernels import dispatch
from openvision.models.layers import sincos_position_table
from openvision.models.openvision import OpenVision
from openvision.models.text import TextConfig, TextTransformer
from openvision.models.variants import variant
from openvision.models.vision import VisionConfig, VisionTransformer


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


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_masked_padding_changes_nothing_and_is_seen_by_nobody(pool):
    torch.manual_seed(0)
    long = TextTransformer(TextConfig(32, 2, 64, 2, 50, 12, pad_id=0, pool=pool), 16)
    short = TextTransformer(replace(long.config, context_length=6), 16)
    state = long.state_dict()
    positions = torch.cat([state["pos_embed"][:, :5], state["pos_embed"][:, -1:]], dim=1)
    short.load_state_dict({**state, "pos_embed": positions})
    ids = torch.tensor([[2, 5, 6, 3, 0, 0, 0, 0, 0, 0, 0, 4], [2, 7, 3, 0, 0, 0, 0, 0, 0, 0, 0, 4]])
    torch.testing.assert_close(long(ids), short(torch.cat([ids[:, :5], ids[:, -1:]], dim=1)), rtol=0, atol=2e-6)
    whole = long.forward_features(ids)
    parts = long.forward_features(ids, token_rows=1)
    torch.testing.assert_close(parts.pooled, whole.pooled, rtol=0, atol=2e-6)
    assert parts.tokens.shape == (1, 11, 32)
    stirred = {**state, "token_embed.weight": state["token_embed.weight"].clone()}
    stirred["token_embed.weight"][0] += 1
    before = long(ids)
    long.load_state_dict(stirred)
    assert torch.equal(long(ids), before)
    with pytest.raises(ValueError, match="give pad_id"):
        TextConfig(32, 2, 64, 2, pool="mean")
    with pytest.raises(ValueError, match="no id of a vocabulary"):
        TextConfig(32, 2, 64, 2, 50, pad_id=50)


def test_initial_values_by_width():
    torch.manual_seed(0)
    config = VisionConfig(64, 1, 128, 2, patch_size=8, image_size=64)
    published, by_width = (VisionTransformer(replace(config, init=init), None) for init in ("published", "by_width"))
    assert published.state_dict()["blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert by_width.state_dict()["blocks.0.attn.qkv.weight"].std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_positions_on_a_grid_of_a_fixed_side() -> None:
    assert torch.equal(sincos_position_table(6, 6, 32, side=6), sincos_position_table(6, 6, 32))
    # The centre patch of 3 x 3 lies where the centre patch of 9 x 9 does.
    assert torch.allclose(sincos_position_table(3, 3, 32, side=9)[4], sincos_position_table(9, 9, 32)[40], atol=1e-6)
    wide = sincos_position_table(2, 8, 32, side=4)
    assert torch.equal(wide, sincos_position_table(2, 8, 32))


def test_a_tower_of_scaled_positions() -> None:
    config = VisionConfig(32, 1, 64, 2, patch_size=8, image_size=64, position_side=8)
    tower = VisionTransformer(config, None)
    small = tower.position_table(4, 4, torch.device("cpu"))
    # Patch 0 of a grid half as fine covers patches 0 and 1 of the fine one, and has the position between them.
    assert small[0, 0] == pytest.approx(math.sin(0.5))
    assert torch.equal(tower.position_table(8, 8, torch.device("cpu")), sincos_position_table(8, 8, 32))
    with pytest.raises(ValueError, match="position_side 0"):
        replace(config, position_side=0)

"""OpenVision 2: shapes and counts, what sees what, which patches are read, generation with a cache."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import openvision.models.decoders.parallel
from openvision.models.decoders.autoregressive import (
    AutoregressiveBlock,
    AutoregressiveDecoderConfig,
    ImageAttention,
    TextPositions,
    teacher_forcing_ids,
)
from openvision.models.kernels.dispatch import attention
from openvision.models.openvision2 import OpenVision2, OpenVision2Config, kept_patches, random_patches
from openvision.models.variants import variant2
from openvision.models.vision import VisionConfig

VISION = VisionConfig(width=24, depth=3, mlp_dim=48, heads=2, patch_size=4, image_size=16)
BOS, EOS = 1, 2
OPTIONS = [(image, text) for image in ("prefix", "causal") for text in ("none", "sincos", "learned")]


def config(image_attention: ImageAttention = "prefix", text_positions: TextPositions = "none") -> OpenVision2Config:
    decoder = AutoregressiveDecoderConfig(32, 3, 64, 4, 50, 11, image_attention, text_positions)
    return OpenVision2Config(VISION, decoder)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 3, 16, 16), torch.randint(3, 50, (3, 11)), random_patches(torch.arange(3), 16, 0.35, 0)


def textbook(model: OpenVision2, images: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    """One sequence, one square mask, every row in every block, all patches encoded and then picked."""
    decoder, tokens = model.decoder, model.vision.forward_features(images).patch_tokens
    tokens = torch.stack([row[chosen] for row, chosen in zip(tokens, keep, strict=True)])
    text = decoder.token_embed(ids)
    if decoder.config.text_positions == "learned":
        text = text + decoder.pos_embed
    elif decoder.config.text_positions == "sincos":
        angle = torch.arange(11)[:, None] * 10000.0 ** -torch.linspace(0, 1, 16)
        text = text + torch.cat([angle.sin(), angle.cos()], dim=1)
    x = torch.cat([decoder.image_proj(tokens), text], dim=1)
    split = tokens.shape[1]
    allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    if decoder.config.image_attention == "prefix":
        allowed[:split, :split] = True
    for block in decoder.blocks:
        assert isinstance(block, AutoregressiveBlock)
        q, k, v = block.attn.split_heads(block.attn.qkv(block.norm1(x)), 3)
        x = x + block.attn.project(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))
        x = x + block.mlp(block.norm2(x))
    return decoder.norm(x[:, split:])


@pytest.mark.parametrize(("image_attention", "text_positions"), OPTIONS)
def test_equals_the_textbook_form_forward_and_backward(image_attention, text_positions):
    model = OpenVision2(config(image_attention, text_positions)).double()
    images, ids, keep = batch()
    images = images.double()
    gradients = []
    for function in (model, lambda *inputs: textbook(model, *inputs)):
        model.zero_grad()
        states = function(images, ids, keep)
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        # The patch embedding computes in float32 always, the image projection too.
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        gradients[-1]["states"] = states.detach()
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = max(1.0, expected.abs().max().item())
        assert (ours[name] - expected).abs().max().item() < 2e-6 * scale, name


def test_only_the_final_norm_of_the_tower_is_not_trained_and_the_head_not_by_the_states():
    model = OpenVision2(config())
    model(*batch()).sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert idle == {"vision.fc_norm.weight", "vision.fc_norm.bias", "decoder.head.weight"}


def test_no_square_is_formed(monkeypatch):
    shapes = []

    def spy(q, k, v, causal=False, seen=None):
        shapes.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, causal, seen)

    monkeypatch.setattr(openvision.models.decoders.parallel, "attention", spy)
    OpenVision2(config())(*batch())
    assert shapes == [(5, 5), (11, 16), (5, 5), (11, 16), (11, 16)]


def test_picked_patches_are_those_of_the_whole_tower():
    model = OpenVision2(config())
    images, _, keep = batch()
    every = model.vision.forward_features(images).patch_tokens
    torch.testing.assert_close(model.vision.patch_tokens(images), every, rtol=0, atol=0)
    picked = every.gather(1, keep[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(model.vision.patch_tokens(images, keep), picked, rtol=0, atol=2e-6)


def test_no_state_sees_a_later_token_and_images_see_no_text():
    model = OpenVision2(config())
    images, ids, keep = batch()
    before = model(images, ids, keep)
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 50
    after = model(images, changed, keep)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize(("image_attention", "text_positions"), OPTIONS)
def test_cached_generation_equals_generation_without_cache(image_attention, text_positions):
    model = OpenVision2(config(image_attention, text_positions)).eval()
    images = torch.randn(4, 3, 16, 16)
    generated = model.generate(images, BOS, EOS)
    ids = torch.full((4, 1), BOS)
    with torch.no_grad():
        for position in range(generated.shape[1]):
            logits = model.caption_logits(images, ids)[:, -1]
            # Ties apart, both ways choose the same; the chosen logit is the largest to rounding in any case.
            chosen = logits.gather(1, generated[:, position, None])[:, 0]
            ended = (ids[:, 1:] == EOS).any(dim=1)
            assert bool((ended | (logits.amax(dim=1) - chosen < 1e-5)).all())
            assert bool((generated[ended, position] == EOS).all())
            ids = torch.cat([ids, generated[:, position, None]], dim=1)
    assert generated.shape[1] <= 11


def test_cached_logits_equal_the_forward_pass():
    model = OpenVision2(config("causal", "learned")).eval()
    images, ids, _ = batch()
    with torch.no_grad():
        expected = model.caption_logits(images, ids)
        caches = model.decoder.prefill(model.vision.patch_tokens(images), 11)
        states = [model.decoder.step(ids[:, i, None], i, caches) for i in range(11)]
        torch.testing.assert_close(model.decoder.logits(torch.cat(states, dim=1)), expected, rtol=0, atol=2e-5)


def test_generation_stops_at_the_end_and_at_the_length():
    model = OpenVision2(config()).eval()
    images = torch.randn(2, 3, 16, 16)
    assert model.generate(images, BOS, EOS, max_length=4).shape[1] <= 4
    first = int(model.generate(images[:1], BOS, -1, max_length=1)[0, 0])
    assert model.generate(images[:1], BOS, first).tolist() == [[first]]


def test_what_stands_after_the_end_is_the_end():
    model = OpenVision2(config()).eval()
    images = torch.randn(12, 3, 16, 16)
    free = model.generate(images, BOS, -1)
    # A token that one caption says early, and another one later or never, plays [eos].
    end = int(free[0, 1])
    ended = model.generate(images, BOS, end)
    for row, unbounded in zip(ended, free, strict=True):
        stop = (unbounded == end).nonzero()
        first = int(stop[0, 0]) if len(stop) else len(unbounded)
        assert torch.equal(row[:first], unbounded[: min(first, len(row))])
        assert (row[first:] == end).all()
    assert (ended != end).any(dim=0)[2:].any(), "no caption went on after another had ended"


def test_too_long_a_caption_is_refused():
    with pytest.raises(ValueError, match="12 ids, the decoder reads at most 11"):
        OpenVision2(config())(torch.randn(1, 3, 16, 16), torch.zeros(1, 12, dtype=torch.int64))


def test_teacher_forcing_shifts_labels_back():
    labels = torch.tensor([[7, 8, EOS, 0, 0], [9, EOS, 0, 0, 0]])
    assert teacher_forcing_ids(labels, BOS).tolist() == [[BOS, 7, 8, EOS, 0], [BOS, 9, EOS, 0, 0]]


def test_random_patches_are_a_function_of_seed_and_position():
    positions = torch.arange(1000, 1064)
    chosen = random_patches(positions, 256, 0.35, seed=3)
    assert chosen.shape == (64, 89)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen[20:40], random_patches(positions[20:40], 256, 0.35, seed=3))
    assert not torch.equal(chosen, random_patches(positions, 256, 0.35, seed=4))
    assert (chosen.diff(dim=1) > 0).all(), "ascending and without repetition"
    assert chosen.min() >= 0
    assert chosen.max() < 256


def test_random_patches_are_uniform():
    chosen = random_patches(torch.arange(20_000), 36, 0.35, seed=0)
    counts = torch.bincount(chosen.flatten(), minlength=36).double() / len(chosen)
    # 12 of 36: a share of 1/3 each, standard deviation 0.0033.
    assert (counts - 1 / 3).abs().max() < 0.017
    both = (chosen == 0).any(1) & (chosen == 1).any(1)
    assert abs(both.double().mean().item() - 12 * 11 / (36 * 35)) < 0.011


@pytest.mark.parametrize(("patches", "kept"), [(36, 12), (256, 89), (576, 201), (729, 255), (1024, 358), (2, 1)])
def test_how_many_are_kept(patches, kept):
    assert kept_patches(patches, 0.35) == kept


def test_keep_ratio_is_a_share():
    with pytest.raises(ValueError, match="keep_ratio"):
        OpenVision2Config(VISION, config().decoder, keep_ratio=0)


@pytest.mark.parametrize(
    ("size", "patch", "tower", "decoder"),
    [
        # Spec section 9 counts Ti; the others follow from the tower of version 1 and the decoder's shape.
        ("tiny", 16, 5_486_400, 17_663_616),
        ("large", 14, 302_914_560, None),
        ("so400m", 14, 412_147_440, None),
        ("huge", 14, 630_434_560, None),
        ("giant", 14, 1_010_839_168, None),
    ],
)
def test_parameter_counts(size, patch, tower, decoder):
    with torch.device("meta"):
        model = OpenVision2(variant2(size, patch, 224))
    assert sum(p.numel() for p in model.vision.parameters()) == tower
    if decoder is not None:
        assert sum(p.numel() for p in model.decoder.parameters()) == decoder


def test_the_configuration_survives_json():
    assert OpenVision2Config.from_dict(config("causal", "learned").to_dict()) == config("causal", "learned")

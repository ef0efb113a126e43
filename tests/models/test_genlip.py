"""GenLIP: one sequence as in the textbook, what sees what, positions, generation with a cache, features, shapes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import openvision.models.decoders.parallel
from openvision.models.genlip import GenLip, GenLipConfig, GenLipTextConfig, GenLipVisionConfig, rotary_table
from openvision.models.kernels.dispatch import attention
from openvision.models.variants import GENLIP_SIZES, variant_genlip

VISION = GenLipVisionConfig(width=48, depth=3, mlp_dim=64, heads=2, patch_size=4, image_size=16)
CONFIG = GenLipConfig(VISION, GenLipTextConfig(32, 50, 11))
PLAIN = GenLipConfig(replace(VISION, gated=False), GenLipTextConfig(48, 50, 11))
BOS, EOS = 1, 2


def batch(height: int = 16, width: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, height, width), torch.randint(3, 50, (3, 11))


def textbook(model: GenLip, images: Tensor, ids: Tensor) -> Tensor:
    """One sequence, one square mask, every row in every block, rotation by complex numbers."""
    ends, conv = model.decoder, model.vision.patch_embed.proj
    patches = F.conv2d(images, conv.weight, conv.bias, stride=conv.stride)
    rows, columns = patches.shape[-2:]
    text = ends.token_embed(ids)
    x = torch.cat([patches.flatten(2).mT, text if ends.in_proj is None else ends.in_proj(text)], dim=1)
    # (time, row, column) of every token, in Python.
    places = [(0, row, column) for row in range(rows) for column in range(columns)]
    places += [(max(rows, columns) + j,) * 3 for j in range(ids.shape[1])]
    heads, split = model.config.vision.heads, rows * columns
    half = model.config.vision.width // heads // 2
    angles = [[place[i % 3] * 10_000.0 ** (-i / half) for i in range(half)] for place in places]
    turn = torch.polar(torch.ones(len(places), half, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
    allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    allowed[:split, :split] = True

    def turned(z: Tensor) -> Tensor:
        z = torch.complex(z[..., :half], z[..., half:]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    for block in model.vision.own_blocks():
        h = block.norm1(x)
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in block.attn.qkv(h).chunk(3, dim=-1))
        seen = F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=allowed).transpose(1, 2).flatten(2)
        if block.gate is not None:
            seen = seen * torch.sigmoid(block.gate(h))
        x = x + block.attn.proj(seen) * block.scale1
        h = block.norm2(x)
        x = x + block.mlp.fc2(F.silu(block.mlp.gate(h)) * block.mlp.fc1(h)) * block.scale2
    states = model.vision.fc_norm(x[:, split:])
    return states if ends.out_proj is None else ends.out_proj(states)


@pytest.mark.parametrize(("config", "size"), [(CONFIG, (16, 16)), (PLAIN, (16, 16)), (CONFIG, (8, 28))])
def test_equals_the_textbook_form_forward_and_backward(config, size):
    model = GenLip(config).double()
    images, ids = batch(*size)
    images = images.double()
    found = []
    for function in (model, lambda *inputs: textbook(model, *inputs)):
        model.zero_grad()
        states = function(images, ids)
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        found[-1]["states"] = states.detach()
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # The table of positions is rounded to float32.
        assert (ours[name] - expected).abs().max().item() < 1e-5 * max(1.0, expected.abs().max().item()), name


def test_every_parameter_is_trained():
    model = GenLip(CONFIG)
    model.caption_logits(*batch()).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == set()
    assert not list(model.untrained_parameters())


def test_no_square_is_formed_and_the_patches_of_the_last_block_are_keys_only(monkeypatch):
    shapes = []

    def spy(q, k, v, causal=False, seen=None):
        shapes.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, causal, seen)

    monkeypatch.setattr(openvision.models.decoders.parallel, "attention", spy)
    GenLip(CONFIG)(*batch())
    assert shapes == [(16, 16), (11, 27), (16, 16), (11, 27), (11, 27)]


def test_no_state_sees_a_later_token():
    model = GenLip(CONFIG)
    images, ids = batch()
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 50
    before, after = model(images, ids), model(images, changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(dim=(0, 2)).min() > 0


def test_captions_of_known_lengths_have_the_same_states():
    model = GenLip(CONFIG)
    images, ids = torch.randn(8, 3, 16, 16), torch.randint(3, 50, (8, 11))
    lengths = torch.tensor([1, 11, 3, 3, 2, 7, 11, 1])
    states, short = model(images, ids), model(images, ids, caption_lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(short[row, :length], states[row, :length], rtol=0, atol=2e-6)


def test_positions_are_turned_by_their_distance_alone():
    """A query and a key that are moved together give the same product: the table is rotary."""
    q, k = torch.randn(2, 24).double()
    products = []
    for shift in (0, 5):
        table = rotary_table(torch.tensor([[3, 0], [4, 2], [1, 7]]) + shift, 24, 10_000.0).double()
        turns = torch.complex(table[0, :, :12], table[1, :, :12])
        first, second = (torch.complex(x[:12], x[12:]) * turn for x, turn in zip((q, k), turns, strict=True))
        products.append((first * second.conj()).real.sum())
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (8, 28)])
def test_cached_logits_equal_the_forward_pass(size):
    model = GenLip(CONFIG).eval()
    images, ids = batch(*size)
    with torch.no_grad():
        expected = model.caption_logits(images, ids)
        caches, grid = model.prefill(images, 11), model.vision.grid_of(images)
        states = [model.step(ids[:, i, None], i, grid, caches) for i in range(11)]
        torch.testing.assert_close(model.decoder.logits(torch.cat(states, dim=1)), expected, rtol=0, atol=2e-5)


def test_generation_is_greedy_and_stops():
    model = GenLip(CONFIG).eval()
    images, _ = batch()
    ids = model.generate(images, BOS, EOS, max_length=4)
    assert ids.shape[1] <= 4
    with torch.no_grad():
        first = model.caption_logits(images, torch.full((3, 1), BOS))[:, 0].argmax(dim=-1)
    assert torch.equal(ids[:, 0], first)
    assert model.generate(images[:1], BOS, int(first[0])).tolist() == [[int(first[0])]]


def test_features_are_the_hidden_states_of_the_patches():
    model = GenLip(CONFIG).eval()
    images, _ = batch(8, 28)
    features = model.vision.forward_features(images, layers=[0, -2, -1])
    assert features.grid == (2, 7)
    assert features.class_token is None
    assert features.num_prefix_tokens == 0
    first, before, last = (layer.patch_tokens for layer in features.layers)
    assert torch.equal(features.patch_tokens, last)
    assert torch.equal(model.vision.patch_tokens(images), last)
    torch.testing.assert_close(features.pooled, model.vision.fc_norm(last.mean(dim=1)))
    assert torch.equal(first, model.vision.embed(images))
    # What the text reads in the last block is what enters it.
    other = GenLip(replace(CONFIG, vision=replace(VISION, readout="before_last")))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.vision.patch_tokens(images), before)
    assert torch.equal(other.vision.forward_features(images, layers=[-1]).layers[0].patch_tokens, last)


def test_a_model_that_was_used_in_inference_mode_can_be_trained():
    model, inputs = GenLip(CONFIG), batch()
    with torch.inference_mode():
        expected = model.caption_logits(*inputs)
    found = model.caption_logits(*inputs)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), expected.clone())


def test_the_order_of_the_patches_matters():
    """Without the rotation the mean over patches could not tell an image from its mirror image."""
    tower = GenLip(CONFIG).eval().vision
    images = torch.randn(1, 3, 4, 16)
    mirrored = images.unflatten(3, (4, 4)).flip(3).flatten(3)
    assert (tower.forward_features(images).pooled - tower.forward_features(mirrored).pooled).abs().max() > 1e-4


def test_a_choice_of_patches_and_too_long_a_caption_are_refused():
    model, keep = GenLip(CONFIG), torch.zeros(3, 2, dtype=torch.int64)
    images, ids = batch()
    with pytest.raises(ValueError, match="reads every patch"):
        model(images, ids, keep)
    with pytest.raises(ValueError, match="reads every patch"):
        model.vision.patch_tokens(images, keep)
    with pytest.raises(ValueError, match="12 ids, the model reads at most 11"):
        model(images, torch.zeros(3, 12, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 16}, "rotary ones must be even"),
        ({"layer_scale": 0.0}, "layer_scale must be above 0"),
        ({"rope_theta": 1.0}, "rope_theta must be above 1"),
        ({"readout": "first"}, "readout must be last or before_last, not 'first'"),
    ],
)
def test_a_bad_shape_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(VISION, **change)


def test_the_configuration_survives_json():
    assert GenLipConfig.from_dict(CONFIG.to_dict()) == CONFIG


@pytest.mark.parametrize(("size", "blocks"), [("large", 329), ("so400m", 466), ("giant", 1227)])
def test_parameter_counts(size, blocks):
    """Millions of a block's matrices, from the sizes of the published configurations: q, gate, k, v, out, SwiGLU."""
    config = variant_genlip(size, 224)
    with torch.device("meta"):
        model = GenLip(config)
    vision = GENLIP_SIZES[size]
    matrices = vision.depth * (5 * vision.width**2 + 3 * vision.width * vision.mlp_dim)
    counted = sum(p.numel() for p in model.vision.blocks.parameters() if p.ndim == 2)
    assert counted == matrices
    assert round(counted / 1e6) == blocks

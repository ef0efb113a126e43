"""Laws of the losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision.models.layers import unit
from openvision.objectives.caption import caption_loss
from openvision.objectives.contrastive import contrastive_losses, info_nce


def test_info_nce_of_orthogonal_pairs():
    eye = torch.eye(4)
    loss = info_nce(eye, eye, torch.tensor(10.0))
    assert math.isclose(loss.item(), math.log(1 + 3 * math.exp(-10)), rel_tol=1e-3)


def test_info_nce_is_symmetric_and_uninformed_at_log_batch():
    a, b = unit(torch.randn(6, 8)), unit(torch.randn(6, 8))
    scale = torch.tensor(5.0)
    assert torch.allclose(info_nce(a, b, scale), info_nce(b, a, scale))
    same = unit(torch.ones(6, 8))
    assert math.isclose(info_nce(same, same, scale).item(), math.log(6), rel_tol=1e-5)


def test_kinds_of_text_are_separate_problems():
    image, alt, sentence = (unit(torch.randn(5, 8)) for _ in range(3))
    scale = torch.tensor(3.0)
    both = contrastive_losses(image, torch.stack([alt, sentence]), scale)
    assert torch.allclose(both, torch.stack([info_nce(image, alt, scale), info_nce(image, sentence, scale)]))


def plain_caption_loss(states, labels, mask, weight):
    logits = states @ weight.T
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / (mask.sum() + 1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 99), st.integers(0, 2**16))
def test_chunks_change_neither_value_nor_gradient(batch, length, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (batch, length), generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    ours = caption_loss(states, labels, mask, weight, chunk_logits=chunk)
    plain = plain_caption_loss(states, labels, mask, weight)
    assert torch.allclose(ours, plain, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, [states, weight]),
        torch.autograd.grad(plain, [states, weight]),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_no_valid_token_is_no_loss():
    states = torch.randn(2, 3, 8)
    loss = caption_loss(
        states, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool), torch.randn(5, 8)
    )
    assert loss.item() == pytest.approx(0.0)


def captions(dtype=torch.float32):
    states, weight = torch.randn(6, 5, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    mask = torch.arange(5) < torch.tensor([0, 0, 1, 5, 4, 2])[:, None]
    return states, torch.randint(0, 11, (6, 5)), mask, weight.requires_grad_()


def test_parts_of_a_batch_add_up_under_a_common_count():
    states, labels, mask, weight = captions(torch.float64)
    whole = caption_loss(states, labels, mask, weight)
    # The first part has no valid token at all.
    pieces = [slice(0, 2), slice(2, 3), slice(3, 6)]
    parts = [caption_loss(states[i], labels[i], mask[i], weight, count=mask.sum()) for i in pieces]
    total = torch.stack(parts).sum()
    assert parts[0].item() == 0
    torch.testing.assert_close(total, whole, rtol=1e-8, atol=0)
    (gradient,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, weight)[0], rtol=1e-8, atol=1e-12)


def test_own_count_given_by_hand_changes_no_bit():
    states, labels, mask, weight = captions()
    assert torch.equal(
        caption_loss(states, labels, mask, weight), caption_loss(states, labels, mask, weight, count=mask.sum())
    )
    empty = torch.zeros_like(mask)
    assert caption_loss(states, labels, empty, weight, count=empty.sum()).item() == 0

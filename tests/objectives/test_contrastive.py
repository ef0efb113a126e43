"""The chunked contrastive loss is the plain one: value, gradients, digits, and what it holds in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openvision.models.layers import unit
from openvision.objectives.contrastive import contrastive_losses, count_equal, info_nce, text_groups

PLAIN = 2**62


def pairs(batch: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = (unit(torch.randn(batch, width, generator=generator, dtype=dtype)) for _ in range(2))
    return images.requires_grad_(), texts.requires_grad_()


def value_and_gradients(images: Tensor, texts: Tensor, scale: Tensor, chunk: int) -> tuple[Tensor, ...]:
    loss = -1.7 * info_nce(images, texts, scale, chunk)
    return loss.detach(), *torch.autograd.grad(loss, [images, texts, scale])


def assert_close(ours: tuple[Tensor, ...], plain: tuple[Tensor, ...], of_largest: float, floor: float) -> None:
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert (mine - theirs).abs().max() <= of_largest * theirs.abs().max() + floor


def in_double(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    images, texts, scale = (x.detach().double().requires_grad_() for x in (images, texts, scale))
    return value_and_gradients(images, texts, scale, PLAIN)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.data(), st.floats(-2, 7), st.integers(0, 2**16))
def test_chunks_change_neither_value_nor_gradient(batch, data, log_scale, seed):
    chunk = data.draw(st.integers(1, batch**2 - 1))
    images, texts = pairs(batch, 5, seed)
    scale = torch.tensor(log_scale, dtype=torch.float64).exp().requires_grad_()
    plain = value_and_gradients(images, texts, scale, PLAIN)
    # Once a batch is solved the gradient is a difference of ones, times the scale: hence an absolute part.
    floor = 1e-15 * (1 + scale.item())
    assert_close(value_and_gradients(images, texts, scale, chunk), plain, 1e-11, floor)


@pytest.mark.parametrize("temperature", [1 / 14.3, 1 / 100, 1e-4])
def test_single_precision(temperature):
    images, texts = pairs(96, 32, 0, torch.float32)
    scale = torch.tensor(1 / temperature, requires_grad=True)
    chunked = value_and_gradients(images, texts, scale, 1000)
    assert all(tensor.isfinite().all() for tensor in chunked)
    exact = in_double(images, texts, scale)
    errors = [(x - y).abs().max() / y.abs().max() for x, y in zip(chunked, exact, strict=True)]
    # A logit of size 1 / temperature is known to that many units of 1e-7.
    assert max(errors) <= 3e-7 * (1 + 1 / temperature)


def test_a_batch_that_is_nearly_solved_keeps_its_digits():
    images = torch.eye(16, requires_grad=True)
    texts = torch.eye(16, requires_grad=True)
    scale = torch.tensor(15.0, requires_grad=True)
    chunked = value_and_gradients(images, texts, scale, 64)
    exact = in_double(images, texts, scale)
    for mine, theirs in zip(chunked, exact, strict=True):
        assert (mine - theirs).abs().max() <= 3e-2 * theirs.abs().max()


def test_small_batches_take_the_plain_form_bit_for_bit():
    images, texts = pairs(32, 16, 0, torch.float32)
    scale = torch.tensor(14.0)
    logits = scale * images @ texts.T
    target = torch.arange(32)
    cross_entropy = torch.nn.functional.cross_entropy
    assert torch.equal(
        info_nce(images, texts, scale), (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    )


def test_chunked_kinds_of_text_are_separate_problems():
    images, alt = pairs(9, 4, 1)
    _, sentence = pairs(9, 4, 2)
    scale = torch.tensor(3.0, dtype=torch.float64)
    both = contrastive_losses(images, torch.stack([alt, sentence]), scale, chunk=20)
    plain = torch.stack([info_nce(images, alt, scale), info_nce(images, sentence, scale)])
    assert torch.allclose(both, plain, rtol=1e-12)


@pytest.mark.parametrize("chunk", [200, 1600], ids=["chunks", "plain"])
def test_autocast_does_not_reach_the_loss(chunk):
    images, texts = pairs(40, 16, 0, torch.float32)
    scale = torch.tensor(20.0, requires_grad=True)
    full = value_and_gradients(images, texts, scale, chunk)
    with torch.autocast("cpu", torch.bfloat16):
        loss = -1.7 * info_nce(images, texts, scale, chunk)
    assert all(map(torch.equal, (loss, *torch.autograd.grad(loss, [images, texts, scale])), full))


def test_autocast_does_not_reach_the_gradient_of_chunks():
    images, texts = pairs(40, 16, 0, torch.float32)
    scale = torch.tensor(20.0, requires_grad=True)
    full = value_and_gradients(images, texts, scale, 200)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, value_and_gradients(images, texts, scale, 200), full))


def test_embeddings_in_half_precision_get_gradients_of_their_own_dtype():
    images, texts = (x.detach().bfloat16().requires_grad_() for x in pairs(12, 16, 0, torch.float32))
    scale = torch.tensor(20.0, requires_grad=True)
    loss, *gradients = value_and_gradients(images, texts, scale, 40)
    assert loss.dtype == torch.float32
    assert [x.dtype for x in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]


class _Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returned = result if isinstance(result, (tuple, list)) else (result,)
        self.entries = max([self.entries, *(x.numel() for x in returned if isinstance(x, Tensor))])
        return result


def test_nothing_of_the_square_of_the_batch_is_made():
    images, texts = pairs(100, 4, 0, torch.float32)
    scale = torch.tensor(5.0, requires_grad=True)
    with _Largest() as chunked:
        value_and_gradients(images, texts, scale, 600)
    with _Largest() as plain:
        value_and_gradients(images, texts, scale, PLAIN)
    assert plain.entries == 100**2
    assert chunked.entries == 2 * 600


def test_second_derivatives_are_refused():
    images, texts = pairs(6, 4, 0)
    scale = torch.tensor(5.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(info_nce(images, texts, scale, 10).square(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_equal_texts_share_their_images_as_they_are():
    """A target spread evenly over equal texts has the same loss and gradient: they are one vector."""
    names = torch.tensor([4, 3, 4, 0, 4, 3, 2, 1])
    images, distinct = pairs(8, 5, 1)
    texts, same = distinct[names], (names[:, None] == names).double()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    logits = scale * images @ texts.T
    # Spelt out: the mean over its right answers of each row's and each column's cross-entropy.
    both = [((each.log_softmax(1) * same).sum(1) / same.sum(1)).mean() for each in (logits, logits.T)]
    spread = -torch.stack(both).mean()
    ours, theirs = (
        torch.autograd.grad(each, [images, distinct, scale], retain_graph=True)
        for each in (info_nce(images, texts, scale), spread)
    )
    torch.testing.assert_close(info_nce(images, texts, scale), spread)
    torch.testing.assert_close(ours, theirs)


def test_equal_texts_are_told_by_their_ids_and_counted():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32000, (200, 80), generator=generator)
    ids[50], ids[120], ids[3] = ids[7], ids[7], ids[150]
    groups = text_groups(ids)
    assert len(set(groups.tolist())) == 197
    assert groups[50] == groups[7] == groups[120]
    assert count_equal(groups).item() == 5
    assert count_equal(groups[60:100]).item() == 0
    swapped = ids[:1].clone()
    swapped[0, :2] = ids[0, :2].flip(0)
    assert text_groups(swapped)[0] != groups[0]

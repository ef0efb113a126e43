"""The sigmoid loss and the joint softmax against their formulas; what they hold in memory and in which precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openvision.models.layers import unit
from openvision.objectives.contrastive import info_nce, joint_info_nce
from openvision.objectives.sigmoid import sigmoid_loss, sigmoid_losses
from tests.objectives.test_contrastive import PLAIN, _Largest, pairs

CHUNKS = [PLAIN, 20, 3]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """Value and gradients, the latter under a factor on the loss."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(-1.7 * loss, inputs, retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("groups", [None, [7, 3, 7, 9, 7, 3, 8, 1]])
def test_every_pair_is_a_binary_cross_entropy(chunk, groups):
    images, texts = pairs(8, 5, 1)
    scale, bias = number(11.0), number(-9.0)
    numbers = torch.arange(8) if groups is None else torch.tensor(groups)
    right = (numbers[:, None] == numbers).double()
    logits = scale * images @ texts.T + bias
    wanted = F.binary_cross_entropy_with_logits(logits, right, reduction="sum") / 8
    given = None if groups is None else numbers
    assert_same(sigmoid_loss(images, texts, scale, bias, chunk, groups=given), wanted, [images, texts, scale, bias])


def test_kinds_of_text_have_their_own_logit_scale_and_one_bias():
    images, alt = pairs(6, 5, 1)
    _, sentence = pairs(6, 5, 2)
    scales, bias = torch.tensor([3.0, 8.0], dtype=torch.float64), number(-2.0)
    both = sigmoid_losses(images, torch.stack([alt, sentence]), scales, bias)
    each = [sigmoid_loss(images, texts, scale, bias) for texts, scale in zip((alt, sentence), scales, strict=True)]
    assert torch.equal(both, torch.stack(each))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("scales", [[6.0], [6.0, 11.0]], ids=["shared", "per text"])
def test_all_captions_of_an_image_are_right_in_one_softmax(chunk, scales):
    images, alt = pairs(7, 5, 1)
    _, sentence = pairs(7, 5, 2)
    scale = torch.tensor(scales, dtype=torch.float64).squeeze().requires_grad_()
    factors = scale.expand(2)
    logits = torch.cat([factor * images @ texts.T for factor, texts in zip(factors, (alt, sentence), strict=True)], 1)
    own = torch.arange(7)
    # Spelt out: an image's cross-entropy against an even target over both its texts; a text's against its image.
    of_images = -logits.log_softmax(1)[own[:, None], torch.stack([own, own + 7], 1)].mean()
    of_texts = F.cross_entropy(logits.T, own.repeat(2))
    ours = joint_info_nce(images, torch.stack([alt, sentence]), scale, chunk)
    assert_same(ours, (of_images + of_texts) / 2, [images, alt, sentence, scale])


def test_one_caption_is_the_plain_softmax():
    images, texts = pairs(9, 5, 3)
    scale = number(14.0)
    assert_same(joint_info_nce(images, texts[None], scale, 20), info_nce(images, texts, scale), [images, texts, scale])


@pytest.mark.parametrize("form", ["sigmoid", "joint"])
def test_logits_are_float32_and_never_the_square_of_the_batch(form):
    images, texts = pairs(100, 4, 0, torch.float32)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0)

    def value() -> Tensor:
        if form == "sigmoid":
            return sigmoid_loss(images, texts, scale, bias, 600)
        return joint_info_nce(images, texts[None], scale, 600)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [images, texts, scale])

    with _Largest() as largest:
        full = value()
        wanted = gradients(full)
    assert largest.entries == 2 * 600
    with torch.autocast("cpu", torch.bfloat16):
        loss = value()
    assert loss.dtype == torch.float32
    assert all(map(torch.equal, (loss, *gradients(loss)), (full, *wanted)))


def test_single_precision_keeps_the_many_small_losses_of_wrong_pairs():
    images, texts = pairs(96, 32, 0, torch.float32)
    loss = sigmoid_loss(images, texts, torch.tensor(10.0), torch.tensor(-10.0), 1000)
    exact = sigmoid_loss(images.double(), texts.double(), torch.tensor(10.0), torch.tensor(-10.0))
    assert abs(loss.item() - exact.item()) < 1e-6 * exact.item()


def test_a_loss_that_nobody_differentiates_computes_no_gradient():
    images, texts = (x.detach() for x in pairs(8, 5, 0))
    scale, bias = (torch.tensor(number, dtype=torch.float64) for number in (10.0, -10.0))
    with _Products() as without:
        sigmoid_loss(images, texts, scale, bias)
    with _Products() as with_gradient:
        sigmoid_loss(images.requires_grad_(), texts, scale, bias)
    assert (without.count, with_gradient.count) == (1, 3)


class _Products(_Largest):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mm" in str(func)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_orthogonal_pairs_by_hand():
    eye = unit(torch.eye(4))
    loss = sigmoid_loss(eye, eye, torch.tensor(10.0), torch.tensor(-5.0))
    torch.testing.assert_close(loss, F.softplus(torch.tensor(-5.0)) + 3 * F.softplus(torch.tensor(-5.0)))

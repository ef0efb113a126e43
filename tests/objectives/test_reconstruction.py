"""The reconstruction losses, by hand and in pieces."""

import pytest
import torch
from torch import Tensor

from openvision.objectives.reconstruction import latent_loss, pixel_losses


def double(latents: Tensor) -> Tensor:
    return 2 * latents.repeat(1, 3, 1, 1)


def test_the_formula_on_two_by_two_pixels():
    images = torch.tensor([[[[1.0, -1.0], [0.0, 0.5]]]]).repeat(1, 3, 1, 1)
    predicted = torch.tensor([[[[0.25, -0.5], [0.0, 0.0]]]])
    # |0.5 - 1|, |-1 + 1|, |0 - 0|, |0 - 0.5|, over four pixels.
    sums = pixel_losses(double, images, predicted, lambda own, other: (own - other).square().sum(dim=(1, 2, 3)))
    assert sums.tolist() == pytest.approx([0.25, 3 * (0.25 + 0.25)])
    assert latent_loss(torch.zeros(1, 1, 2, 2), predicted).item() == pytest.approx(0.75 / 4)
    assert pixel_losses(double, images, predicted).tolist() == pytest.approx([0.25, 0.0])


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_few_images_at_a_time_give_the_same_numbers_and_gradients(at_once):
    images, predicted = torch.rand(5, 3, 4, 4), torch.rand(5, 1, 4, 4, requires_grad=True)
    whole = pixel_losses(double, images, predicted)
    (expected,) = torch.autograd.grad(whole[0], predicted)
    parts = pixel_losses(double, images, predicted, at_once=at_once)
    (found,) = torch.autograd.grad(parts[0], predicted)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(found, expected)


def test_decoding_a_few_at_a_time_keeps_no_activations_of_the_decoder():
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def wide(latents: Tensor) -> Tensor:
        for _ in range(6):
            latents = latents.exp().log()
        return double(latents)

    images, predicted = torch.rand(4, 3, 4, 4), torch.rand(4, 1, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pixel_losses(wide, images, predicted)
        all_kept, kept = sum(kept), []
        pixel_losses(wide, images, predicted, at_once=2)
    assert sum(kept) < all_kept / 2


def test_no_sample_has_no_loss_and_a_gradient_of_zero():
    predicted = torch.rand(0, 1, 4, 4, requires_grad=True)
    sums = pixel_losses(double, torch.rand(0, 3, 4, 4), predicted)
    assert sums.tolist() == [0.0, 0.0]
    sums.sum().backward()

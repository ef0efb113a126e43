"""Muon: orthogonal updates of the matrices inside blocks, query, key and value apart; everything else is Adam's."""

import pytest
import torch
from torch import Tensor, nn

from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.recipe.sections import Optimizer
from openvision.training.optimizer.adam import Adam
from openvision.training.optimizer.build import build_optimizer
from openvision.training.optimizer.muon import MOMENTUM, Muon, newton_schulz, orthogonal


def model() -> OpenVision:
    torch.manual_seed(0)
    return OpenVision(
        OpenVisionConfig(
            embed_dim=16,
            vision=VisionConfig(width=16, depth=2, mlp_dim=48, heads=2, patch_size=4, image_size=8),
            text=TextConfig(width=16, depth=1, mlp_dim=32, heads=2, vocab_size=30, context_length=6),
        )
    )


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_an_update_keeps_the_singular_vectors_and_makes_their_values_alike(shape):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    u, values, vh = torch.linalg.svd(gradient, full_matrices=False)
    assert values.max() / values.min() > 3
    made = u.T @ newton_schulz(gradient[None])[0] @ vh.T
    assert (made.diagonal() - 1).abs().max() < 0.35
    assert (made - made.diagonal().diag()).abs().max() < 1e-4


def test_query_key_and_value_are_matrices_of_their_own():
    torch.manual_seed(0)
    stack = torch.randn(48, 16)
    stack[16:32] *= 1000
    whole = orthogonal([torch.randn(5, 7), stack], 1)[1]
    apart = orthogonal([stack], 3)[0]
    for part, matrix in zip(apart.split(16), stack.split(16), strict=True):
        torch.testing.assert_close(part, orthogonal([matrix])[0])
        assert torch.linalg.svdvals(part).min() > 0.2 * 4 * 0.6
    # As one matrix the large part leaves the others next to nothing.
    assert torch.linalg.svdvals(whole[:16]).max() < torch.linalg.svdvals(apart[:16]).min() / 10


def test_which_parameters_it_updates():
    network = model()
    optimizer = build_optimizer(network, Optimizer(kind="muon"))
    assert isinstance(optimizer, Muon)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found: dict[int, set[str]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group.get("parts", 0), set()).update(names[id(each)] for each in group["params"])
    assert set().union(*found.values()) == set(names.values())
    assert {name.split(".")[-2] for name in found[3]} == {"qkv"}
    # A hidden layer three times as wide is no stack.
    assert {name.split(".")[-2] for name in found[1]} == {"proj", "fc1", "fc2"}
    assert all(".blocks." in name and name.endswith("weight") for name in found[1] | found[3])
    assert {"vision.patch_embed.proj.weight", "text.head.weight", "text.token_embed.weight"} <= found[0]


def steps(optimizer: Adam, parameters: list[nn.Parameter], selections: list[bool | None]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for selected in selections:
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if selected is False:
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, torch.nan)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step(selected=None if selected is None else torch.tensor(selected))
    return [parameter.detach().clone() for parameter in parameters]


def pair() -> tuple[Muon, list[nn.Parameter]]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (12, 4), (5,))]
    groups = [{"params": parameters[2:], "weight_decay": 0.0}]
    for parts, parameter in zip((1, 3), parameters, strict=False):
        groups.append({"params": [parameter], "weight_decay": 0.2, "parts": parts})
    return Muon(groups), parameters


def test_an_update_that_is_left_out_on_the_device_leaves_nothing_behind():
    expected = steps(*pair(), [None, None])
    optimizer, parameters = pair()
    generator_skips = steps(optimizer, parameters, [True, True])
    assert all(torch.equal(a, b) for a, b in zip(expected, generator_skips, strict=True))
    before = [parameter.detach().clone() for parameter in parameters]
    momenta = [optimizer.state[each][MOMENTUM].clone() for each in parameters[:2]]
    after = steps(optimizer, parameters, [False])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, optimizer.state[b][MOMENTUM]) for a, b in zip(momenta, parameters, strict=False))


def test_the_measured_norm_is_that_of_what_was_added():
    optimizer, parameters = pair()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.measure = True
    before = [parameter.detach().clone() for parameter in parameters]
    after = steps(optimizer, parameters, [None])
    norm = torch.stack([(a - b).norm() for a, b in zip(after, before, strict=True)]).norm()
    assert optimizer.update_norm is not None
    torch.testing.assert_close(optimizer.update_norm, norm)


def test_it_learns_what_adam_learns():
    torch.manual_seed(0)
    network = model()
    optimizer = build_optimizer(network, Optimizer(kind="muon", weight_decay=0.0))
    images, ids = torch.rand(8, 3, 8, 8), torch.randint(0, 30, (8, 6))

    def loss() -> Tensor:
        image, text = network.encode_image(images), network.encode_text(ids)
        return nn.functional.cross_entropy(network.logit_scale.exp() * image @ text.T, torch.arange(8))

    first = loss().item()
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < first / 4

"""Clipping, norms and averaging around an optimizer's step."""

import pytest
import torch
from torch import nn

from openvision.training.optimizer.adam import Adam, with_gradient
from openvision.training.optimizer.update import AVERAGE, apply_update, averaged_parameters, gradient_norm


def trained(steps: int = 3) -> tuple[list[torch.Tensor], Adam]:
    """Parameters of odd sizes after some steps."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((70, 33), (5,), (), (401,), (1, 300))]
    optimizer = Adam([{"params": parameters[:2], "weight_decay": 0.2}, {"params": parameters[2:]}])
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        apply_update(optimizer, 0.01, gradient_norm(optimizer))
    return [parameter.detach() for parameter in parameters], optimizer


def test_clipping_scales_the_gradient_down_to_the_norm():
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = Adam([{"params": [parameter]}])
    parameter.grad = torch.full((4,), 5.0)
    norms = apply_update(optimizer, 0.1, gradient_norm(optimizer), clip_norm=1.0, measure=True)
    assert parameter.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert norms is not None
    assert norms.gradient.item() == pytest.approx(10.0)
    parameter.grad = torch.full((4,), 0.1)
    apply_update(optimizer, 0.1, gradient_norm(optimizer), clip_norm=1.0)
    assert torch.equal(parameter.grad, torch.full((4,), 0.1))


def test_norms_are_those_of_gradient_parameters_and_update():
    before, optimizer = trained(steps=1)
    before = [parameter.clone() for parameter in before]
    norms = apply_update(optimizer, 0.01, gradient_norm(optimizer), measure=True)
    after = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    assert norms is not None
    assert norms.update.item() == pytest.approx(moved.item(), rel=1e-3)
    assert norms.parameter.item() == pytest.approx(torch.cat([b.flatten() for b in before]).norm().item(), rel=1e-5)
    gradients = [parameter.grad.flatten() for parameter in with_gradient(optimizer) if parameter.grad is not None]
    assert norms.gradient.item() == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-5)


def test_the_average_follows_the_parameters_and_takes_their_place():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(70))
    optimizer = Adam([{"params": [parameter]}])
    average = parameter.detach().clone()
    for _ in range(4):
        parameter.grad = torch.randn(70)
        apply_update(optimizer, 0.1, gradient_norm(optimizer), ema=0.75)
        average = 0.75 * average + 0.25 * parameter.detach()
    now = parameter.detach().clone()
    with averaged_parameters(optimizer):
        assert torch.allclose(parameter, average, atol=1e-6)
        assert not torch.equal(parameter, now)
    assert torch.equal(parameter, now)
    assert torch.allclose(optimizer.state[parameter][AVERAGE], average, atol=1e-6)


def test_without_ema_nothing_takes_the_parameters_place():
    parameters, optimizer = trained()
    before = [parameter.clone() for parameter in parameters]
    with averaged_parameters(optimizer):
        assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))

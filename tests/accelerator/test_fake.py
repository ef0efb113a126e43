"""The pretended accelerator notices what it is for."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tests.accelerator.fake import fake_accelerator

WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_waits_of_the_host_raise(wait):
    with fake_accelerator() as accelerator:
        x = torch.ones(3, device=accelerator.device)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            wait(x)


def test_tensors_on_two_devices_raise():
    with fake_accelerator() as accelerator, pytest.raises(RuntimeError, match="device"):
        torch.add(torch.ones(3, device=accelerator.device), torch.ones(3))


def test_copies_are_counted_either_way():
    with fake_accelerator() as accelerator:
        x = torch.ones(3).to(accelerator.device)
        torch.tensor([1.0, 2.0], device=accelerator.device)
        assert accelerator.to_device.total() == 2
        assert accelerator.to_host.total() == 0
        x.cpu().numpy()
        x.to("cpu", non_blocking=True)
        torch.empty(3).copy_(x)
        assert accelerator.to_host.total() == 3
        accelerator.forget()
        assert (x + 1).device == accelerator.device
        assert not accelerator.to_device
        assert not accelerator.to_host


def test_modules_are_placed_and_trained():
    with torch.device("meta"):
        module = nn.Linear(4, 3)
    with fake_accelerator() as accelerator:
        accelerator.place(module)
        module(torch.ones(2, 4, device=accelerator.device)).sum().backward()
        assert module.weight.grad is not None
        assert module.weight.grad.device == accelerator.device
    assert not accelerator.to_host

"""The guard of an accelerator, on the CPU: updates are selected, never half made, and the host learns of them later."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from openvision.errors import OpenVisionError
from openvision.recipe.sections import Guards
from openvision.runtime import SINGLE_PROCESS, Processes
from openvision.training.checkpoint.folders import Progress
from openvision.training.guards import DeferredGuard
from openvision.training.objective import Losses
from openvision.training.optimizer.adam import Adam
from openvision.training.optimizer.update import apply_update, gradient_norm


def losses_of(value: float) -> Losses:
    return Losses(torch.tensor(value), {"caption": torch.tensor(value)})


def trained(selections: list[bool | None]) -> tuple[nn.Linear, Adam]:
    """A module after an update for each selection; those not to be selected have NaN for a gradient."""
    torch.manual_seed(0)
    module = nn.Linear(5, 4)
    optimizer = Adam([{"params": list(module.parameters()), "weight_decay": 0.1}])
    for number, selected in enumerate(selections):
        for parameter in module.parameters():
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if selected is False:
                parameter.grad.fill_(math.nan)
        flag = None if selected is None else torch.tensor(selected)
        apply_update(optimizer, 0.01, gradient_norm(optimizer), clip_norm=1.0, ema=0.9, selected=flag)
    return module, optimizer


def test_a_selected_update_is_the_plain_one():
    plain, plain_optimizer = trained([None, None, None])
    selected, optimizer = trained([True, True, True])
    for ours, theirs in zip(selected.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)
        state, wanted = optimizer.state[ours], plain_optimizer.state[theirs]
        assert state.keys() == wanted.keys()
        assert state["step"] == wanted["step"] == 3
        for name in ("exp_avg", "exp_avg_sq", "average"):
            assert torch.allclose(state[name].float(), wanted[name].float(), rtol=1e-6, atol=1e-8)


def test_an_update_that_is_not_selected_leaves_no_trace():
    module, optimizer = trained([True, False, True])
    optimizer.settle(1)
    # The same updates without the second: gradients are numbered, so leave the second number out.
    expected = nn.Linear(5, 4)
    torch.manual_seed(0)
    expected.load_state_dict(nn.Linear(5, 4).state_dict())
    other = Adam([{"params": list(expected.parameters()), "weight_decay": 0.1}])
    for number in (0, 2):
        for parameter in expected.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        apply_update(other, 0.01, gradient_norm(other), clip_norm=1.0, ema=0.9)
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)
        assert optimizer.state[ours]["step"] == other.state[theirs]["step"] == 2
        assert torch.allclose(optimizer.state[ours]["exp_avg_sq"], other.state[theirs]["exp_avg_sq"], rtol=1e-6)
        assert torch.allclose(optimizer.state[ours]["average"], other.state[theirs]["average"], rtol=1e-6)


def test_the_host_learns_of_a_broken_step_two_steps_later_and_names_it():
    progress = Progress()
    guard = DeferredGuard(Guards(), progress, SINGLE_PROCESS)
    selected = []
    for value in (1.0, math.inf, 1.0, 1.0):
        guard.learn()
        selected.append(bool(guard.select(losses_of(value), torch.tensor(1.0))))
        progress.step += 1
    assert selected == [True, False, True, True]
    with pytest.raises(OpenVisionError, match="step 2: loss, caption is not finite"):
        guard.learn()


def test_a_gradient_that_is_not_finite_is_named_before_a_checkpoint():
    guard = DeferredGuard(Guards(), Progress(step=6), SINGLE_PROCESS)
    assert not guard.select(losses_of(1.0), torch.tensor(math.nan))
    with pytest.raises(OpenVisionError, match="step 7: the gradient is not finite"):
        guard.settle(Adam([{"params": [nn.Parameter(torch.zeros(1))]}]))


def test_spikes_are_skipped_on_the_device_and_counted_when_the_host_knows():
    progress = Progress(recent_losses=[1.0, 1.1] * 15)
    guard = DeferredGuard(Guards(spikes="skip"), progress, SINGLE_PROCESS)
    module = nn.Linear(2, 2)
    optimizer = Adam([{"params": list(module.parameters())}])
    selected = []
    for value in (1.0, 50.0, 1.0):
        flag = guard.select(losses_of(value), torch.tensor(1.0))
        selected.append(bool(flag))
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(selected=flag)
        progress.step += 1
    assert selected == [True, False, True]
    ((step, spike),) = guard.settle(optimizer)
    assert (step, spike.skipped, progress.skipped) == (2, True, 1)
    assert {state["step"] for state in optimizer.state.values()} == {2}
    assert 50.0 not in progress.recent_losses


def test_the_loss_that_is_logged_is_this_process_s_own(monkeypatch):
    def all_reduce(tensor, operation=dist.ReduceOp.SUM, group=None):
        """As if another process had the same numbers."""
        if operation == dist.ReduceOp.SUM:
            tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    losses = losses_of(2.0)
    guard = DeferredGuard(Guards(), Progress(), Processes(size=2, group=object()))  # pyright: ignore[reportArgumentType]
    guard.select(losses, torch.tensor(1.0))
    assert losses.values() == {"loss": 2.0, "caption": 2.0}
    *_, loss, _ = guard._pending[0].found.values()
    assert loss == 2.0

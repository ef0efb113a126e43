"""Guards: what is not finite never enters the parameters, and a spike of the loss is told from its noise."""

import pytest
import torch
from torch import nn

from openvision.errors import OpenVisionError
from openvision.recipe.sections import Guards
from openvision.runtime import SINGLE_PROCESS
from openvision.training.checkpoint.folders import Progress
from openvision.training.guards import find_spike, raise_not_finite, require_finite_parameters
from openvision.training.objective import Losses
from openvision.training.optimizer.adam import Adam


def losses_of(value: float) -> Losses:
    return Losses(torch.tensor(value), {"caption": torch.tensor(value), "contrastive": torch.tensor(1.0)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_loss_is_named(value):
    names = losses_of(value).not_finite()
    with pytest.raises(OpenVisionError, match=r"^step 5: loss, caption is not finite; nothing was updated"):
        raise_not_finite(names, 5, SINGLE_PROCESS)


def test_losses_that_are_finite_are_not_named():
    assert losses_of(2.0).not_finite() == []


def fed(guards: Guards, losses: list[float]) -> tuple[Progress, list[float]]:
    """Progress after the losses, and which of them were spikes."""
    progress, spikes = Progress(), []
    for loss in losses:
        if find_spike(loss, progress, guards) is not None:
            spikes.append(loss)
    return progress, spikes


NOISE = [2.0 + 0.1 * ((7 * step) % 5) for step in range(40)]


def test_noise_is_no_spike_and_a_spike_is_one():
    guards = Guards(spikes="log", spike_window=20)
    assert fed(guards, NOISE)[1] == []
    assert fed(guards, [*NOISE, 9.0, *NOISE])[1] == [9.0]
    assert fed(guards, [*([3.0] * 30), 3.1, 3.05])[1] == []
    assert fed(guards, [5.0] * 19 + [50.0])[1] == []


def test_a_falling_loss_is_no_spike():
    assert fed(Guards(spikes="log"), [10.0 / (1 + step / 5) for step in range(200)])[1] == []


def test_the_window_is_bounded_and_spikes_do_not_enter_it_when_skipped():
    progress, spikes = fed(Guards(spikes="skip", spike_window=20), [*NOISE, 9.0, *NOISE])
    assert spikes == [9.0]
    assert len(progress.recent_losses) == 20
    assert max(progress.recent_losses) < 3
    assert progress.skipped == 1
    assert progress.skipped_in_a_row == 0


def test_off_remembers_nothing():
    progress, spikes = fed(Guards(), [*NOISE, 90.0])
    assert spikes == []
    assert progress == Progress()


def test_too_many_skipped_in_a_row_end_the_run():
    with pytest.raises(OpenVisionError, match=r"11 steps in a row: this is no spike"):
        fed(Guards(spikes="skip"), [*NOISE, *[9.0] * 11])
    assert len(fed(Guards(spikes="log"), [*NOISE, *[9.0] * 11])[1]) >= 1


def test_parameters_that_are_not_finite_are_not_saved():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = Adam([{"params": [parameter]}])
    require_finite_parameters(optimizer)
    with torch.no_grad():
        parameter[1] = float("inf")
    with pytest.raises(OpenVisionError, match="no longer finite and not saved; the last good checkpoint is kept"):
        require_finite_parameters(optimizer)

"""Guards: what is not finite never enters the parameters, and a jump of the loss is told from its noise."""

import pytest
import torch

from openvision.errors import OpenVisionError
from openvision.recipe.schema import Guards
from openvision.training.checkpoint.folders import Progress
from openvision.training.guards import refuse_broken, watch_loss
from openvision.training.losses import Losses


def losses_of(value: float) -> Losses:
    return Losses(torch.tensor(value), {"caption": torch.tensor(value), "contrastive": torch.tensor(1.0)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_loss_is_named(value):
    with pytest.raises(OpenVisionError, match=r"^loss, caption is not finite; nothing was updated"):
        refuse_broken(losses_of(value), torch.tensor(1.0))


def test_a_broken_gradient_is_noticed_though_the_loss_is_fine():
    assert refuse_broken(losses_of(2.0), torch.tensor(1.0))
    with pytest.raises(OpenVisionError, match="the gradient is not finite"):
        refuse_broken(losses_of(2.0), torch.tensor(float("inf")))


def fed(guards: Guards, losses: list[float]) -> tuple[Progress, list[float]]:
    """Progress after the losses, and which of them were jumps."""
    progress, jumps = Progress(), []
    for loss in losses:
        if watch_loss(loss, progress, guards) is not None:
            jumps.append(loss)
    return progress, jumps


NOISE = [2.0 + 0.1 * ((7 * step) % 5) for step in range(40)]


def test_noise_is_no_jump_and_a_jump_is_one():
    guards = Guards(spikes="log", spike_window=20)
    assert fed(guards, NOISE)[1] == []
    assert fed(guards, [*NOISE, 9.0, *NOISE])[1] == [9.0]
    assert fed(guards, [*([3.0] * 30), 3.1, 3.05])[1] == []
    assert fed(guards, [5.0] * 19 + [50.0])[1] == []


def test_a_falling_loss_is_no_jump():
    assert fed(Guards(spikes="log"), [10.0 / (1 + step / 5) for step in range(200)])[1] == []


def test_the_window_is_bounded_and_jumps_do_not_enter_it_when_skipped():
    progress, jumps = fed(Guards(spikes="skip", spike_window=20), [*NOISE, 9.0, *NOISE])
    assert jumps == [9.0]
    assert len(progress.recent_losses) == 20
    assert max(progress.recent_losses) < 3
    assert progress.skipped == 1
    assert progress.skipped_in_a_row == 0


def test_off_remembers_nothing():
    progress, jumps = fed(Guards(), [*NOISE, 90.0])
    assert jumps == []
    assert progress == Progress()


def test_too_many_skipped_in_a_row_end_the_run():
    with pytest.raises(OpenVisionError, match=r"11 steps in a row: this is no jump"):
        fed(Guards(spikes="skip"), [*NOISE, *[9.0] * 11])
    assert len(fed(Guards(spikes="log"), [*NOISE, *[9.0] * 11])[1]) >= 1

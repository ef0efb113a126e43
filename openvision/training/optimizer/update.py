"""From gradients to an update: norms over all shards, clipping, the optimizer's step, averaging of parameters (EMA).

The average is kept in the optimizer's state, so a checkpoint holds it beside the moments, cut as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from openvision.runtime import HostCopy, is_sharded, local_tensor
from openvision.training.optimizer.adam import Adam, with_gradient

AVERAGE = "average"
"""Name of the averaged parameter in the optimizer's state."""


@dataclass(frozen=True)
class Norms:
    """Euclidean norms over all trained parameters, 0-d tensors on their device."""

    gradient: Tensor
    """Before it is clipped."""
    parameter: Tensor
    """Before the update."""
    update: Tensor
    """Of what was added to the parameters."""

    def values(self) -> dict[str, float]:
        """By the names of the log; this waits for the device."""
        norms = HostCopy(torch.stack([self.gradient, self.parameter, self.update])).values()
        return dict(zip(("gradient_norm", "parameter_norm", "update_norm"), norms, strict=True))


def apply_update(
    optimizer: Adam,
    learning_rate: float,
    gradient_norm: Tensor,
    clip_norm: float | None = None,
    ema: float | None = None,
    measure: bool = False,
    selected: Tensor | None = None,
) -> Norms | None:
    """Clip the gradients to `clip_norm`, update the parameters and, with the decay `ema`, their average.

    `selected` as for `Adam.step`. Returns the norms if they are measured.
    """
    parameters = with_gradient(optimizer)
    parameter_norm = global_norm(parameters) if measure else None
    if clip_norm is not None:
        clip_gradients(parameters, gradient_norm, clip_norm)
    if ema is not None:
        start_average(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("multiplier", 1.0)
    optimizer.measure = measure
    optimizer.step(selected=selected)
    if ema is not None:
        update_average(optimizer, ema, selected)
    if parameter_norm is None or optimizer.update_norm is None:
        return None
    return Norms(gradient_norm, parameter_norm, optimizer.update_norm)


def gradient_norm(optimizer: Adam) -> Tensor:
    """Norm of all gradients, over all shards, shape ()."""
    return global_norm([parameter.grad for parameter in with_gradient(optimizer) if parameter.grad is not None])


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all elements, over all shards, shape (); single numbers are not sharded where matrices are."""
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if not sharded:
        return torch.nn.utils.get_total_norm(tensors)
    norms = [torch.nn.utils.get_total_norm(sharded).full_tensor()]  # pyright: ignore[reportAttributeAccessIssue]
    if replicated := [tensor for tensor in tensors if not is_sharded(tensor)]:
        norms.append(torch.nn.utils.get_total_norm(replicated))
    return torch.stack(norms).norm()


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale the gradients, whose norm is `norm`, down to the norm `limit` where it is greater."""
    gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def start_average(optimizer: Adam) -> None:
    """Begin the average of every parameter that has none and is about to be updated with its value now."""
    for parameter in with_gradient(optimizer):
        if AVERAGE not in optimizer.state[parameter]:
            optimizer.state[parameter][AVERAGE] = parameter.detach().clone()


@torch.no_grad()
def update_average(optimizer: Adam, decay: float, selected: Tensor | None = None) -> None:
    """average = decay * average + (1 - decay) * parameter, for every parameter that was updated.

    `selected` as for `Adam.step`.
    """
    parameters = with_gradient(optimizer)
    averages = [local_tensor(optimizer.state[parameter][AVERAGE]) for parameter in parameters]
    values = [local_tensor(parameter) for parameter in parameters]
    if selected is None:
        torch._foreach_lerp_(averages, values, 1 - decay)
        return
    for average, value in zip(averages, values, strict=True):
        average.copy_(torch.where(selected, torch.lerp(average, value, 1 - decay), average))


@contextmanager
def averaged_parameters(optimizer: Adam) -> Iterator[None]:
    """Averaged parameters in place of the trained ones while the context lasts; nothing without an average."""
    averages = {parameter: state[AVERAGE] for parameter, state in optimizer.state.items() if AVERAGE in state}
    _exchange(averages)
    try:
        yield
    finally:
        _exchange(averages)


@torch.no_grad()
def _exchange(averages: dict[Tensor, Tensor]) -> None:
    for parameter, average in averages.items():
        trained = parameter.detach().clone()
        parameter.copy_(average)
        average.copy_(trained)

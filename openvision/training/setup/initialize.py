"""First values of a model's parameters: the same numbers at every number of processes, in every sharding mode.

The model is built on the meta device, cut (parallel.py), given memory and filled with NaN, so that a parameter that
nobody initialises is noticed at once. Then its own initialisers run on stand-ins: each parameter in turn exists in
full, on the CPU, while it is written, and a process keeps its slice of it. The random numbers are therefore those of a
model built in one piece from the same seed, and no process ever holds more than one whole parameter.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from openvision.errors import OpenVisionError


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device memory full of NaN."""
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter of a materialised model from `seed`, as building it after `torch.manual_seed(seed)` does.

    Raises OpenVisionError when an initialiser forgot a parameter.
    """
    workshop = _Workshop()
    owners = _parameter_owners(model)
    for module, name, parameter in owners:
        module._parameters[name] = _StandIn.of(parameter, workshop)  # pyright: ignore[reportArgumentType]
    try:
        torch.manual_seed(seed)
        for child in model.children():
            _as_constructed(child)
        if callable(init := getattr(model, "init_temperature", None)):
            init()
        workshop.deliver()
    finally:
        for module, name, parameter in owners:
            module._parameters[name] = parameter
    forgotten = [name for name, parameter in model.named_parameters() if _local(parameter).isnan().any()]
    if forgotten:
        raise OpenVisionError(f"no initialiser of {type(model).__name__} writes {', '.join(forgotten)}")


@torch.no_grad()
def take_slices(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy into each parameter of `model` this process's slice of the whole tensor in `state`."""
    for name, parameter in model.named_parameters():
        _local(parameter).copy_(state[name][_slice_of(parameter)])


def _as_constructed(tower: nn.Module) -> None:
    """What the constructor of a tower does to the generator: its layers' own defaults, then `init_weights`."""
    for module in tower.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    tower.init_weights()  # pyright: ignore[reportCallIssue]


def _parameter_owners(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]


class _Workshop:
    """Where one parameter at a time exists in full."""

    def __init__(self) -> None:
        self._target: Tensor | None = None
        self._whole = torch.empty(0)

    def whole_of(self, target: Tensor) -> Tensor:
        """The parameter in full; the one before goes back to its place."""
        if target is not self._target:
            self.deliver()
            self._target = target
            self._whole = torch.full(target.shape, float("nan"), dtype=target.dtype)
        return self._whole

    def deliver(self) -> None:
        """Copy this process's slice of the parameter to its place."""
        if self._target is not None:
            local = _local(self._target)
            if local.numel():
                local.copy_(self._whole[_slice_of(self._target)])
            self._target = None


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _slice_of(tensor: Any) -> tuple[slice, ...]:
    if not hasattr(tensor, "to_local"):
        return (slice(None),) * tensor.ndim
    # Importing this takes a second, which only runs that shard should pay.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))


class _StandIn(Tensor):
    """Stands for a parameter: whatever is asked of it or done to it, the whole parameter answers."""

    target: Tensor
    workshop: _Workshop

    @staticmethod
    def of(target: Tensor, workshop: _Workshop) -> "_StandIn":
        stand_in = torch.empty(0).as_subclass(_StandIn)
        stand_in.target, stand_in.workshop = target, workshop
        return stand_in

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = {key: _answer(value) for key, value in (kwargs or {}).items()}
        return func(*(_answer(argument) for argument in args), **named)


def _answer(value: Any) -> Any:
    return value.workshop.whole_of(value.target) if isinstance(value, _StandIn) else value

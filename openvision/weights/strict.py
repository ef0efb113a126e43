"""Strict loading: a tensor that is missing, extra or of another shape is an error that lists it."""

from collections.abc import Mapping

from torch import Tensor, nn

from openvision.errors import OpenVisionError

_SHOWN = 5


def assign_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Assign the tensors of `state` to `module`, which may be on the meta device, without a copy.

    Raises OpenVisionError that names `source` and the tensors that do not fit.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of the model" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {found[name]} instead of {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        raise OpenVisionError(f"{source} does not fit the model, a checkpoint of another size? {listed(problems)}")
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)


def listed(problems: list[str]) -> str:
    """The first problems, sorted, and the number of others."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(sorted(problems)[:_SHOWN]) + more

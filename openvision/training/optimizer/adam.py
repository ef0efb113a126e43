"""Adam of the original (spec section 5).

- Decoupled weight decay on matrices only: every kernel (patch convolution, attention, MLP, heads, decoder projections)
  decays; biases, norms, embeddings, positions, class token, queries and logit scale do not.
- The first moment is stored in bfloat16. It is rounded for storage only: the step uses the float32 value.
- Tensors are updated together by fused list operations: a small model has hundreds of tiny tensors. On a CPU large
  ones are cut into tiles that stay in the cache between the dozen operations on them; no number changes by it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

from openvision.models.kernels.gpu import HAS_TRITON
from openvision.runtime import local_tensor, sum_over_shards

# Elements of a tile on a CPU, few enough to stay near its caches; elsewhere few enough for the copies that a selected
# update makes.
TILE_ON_CPU = 2**17
TILE_ELSEWHERE = 2**26
# Tiles hold a whole number of vectors: a cut elsewhere would send elements through the scalar code.
VECTOR = 64


class ParameterGroup(TypedDict):
    """Parameters that are updated alike."""

    params: list[nn.Parameter]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    multiplier: NotRequired[float]
    """Factor on the learning rate of a step; 1 where it is missing."""
    parts: NotRequired[int]
    """Muon alone: see there."""


class Adam(torch.optim.Optimizer):
    """Adam with decoupled weight decay, whose first moment may be stored in bfloat16."""

    param_groups: list[ParameterGroup]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        groups: Iterable[dict[str, object]],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        first_moment: torch.dtype = torch.bfloat16,
    ) -> None:
        """`groups` as in torch: tables of `params`, and of `weight_decay` and `lr` where they are not 0."""
        self.first_moment = first_moment
        self.measure = False
        """Whether `step` leaves the norm of its update in `update_norm`."""
        self.update_norm: Tensor | None = None
        self._left_out: Tensor | None = None
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, selected: Tensor | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient.

        `selected`, bool () on the parameters' device, says whether parameters, moments and counts take their new
        values: the host need not know. They are selected, not multiplied: zero times NaN is NaN. Call `settle` once the
        host knows how many updates were left out.
        """
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        squares: list[Tensor] = []
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            squares += self._update_group(group, trained, selected)
        if selected is not None:
            self._left_out = self._updates_left_out(selected.device) + ~selected
        self.update_norm = None
        if squares and self.measure:
            self.update_norm = sum_over_shards(torch.stack(squares).sum(), with_gradient(self)).sqrt()

    def _update_group(
        self, group: ParameterGroup, trained: list[nn.Parameter], selected: Tensor | None
    ) -> list[Tensor]:
        """Update the parameters of a group that have a gradient; returns squared norms, if they are measured."""
        squares: list[Tensor] = []
        for parameter in trained:
            self._count(parameter)
        tile = TILE_ON_CPU if trained and trained[0].device.type == "cpu" else TILE_ELSEWHERE
        fused = selected is not None and _has_kernel([local_tensor(each) for each in trained])
        for count, alike in groupby(trained, key=lambda parameter: self.state[parameter]["step"]):
            rows = map(self._flat, alike)
            if selected is not None and fused:
                squares.append(self._fused_update(group, count, rows, selected))
                continue
            for tensors in tiles(rows, tile):
                if selected is None:
                    squares += self._update(group, count, *tensors)
                else:
                    squares += self._selected_update(group, count, tensors, selected)
        return squares

    def settle(self, left_out: int) -> None:
        """Take `left_out` updates, all that were since the last call, out of the counts."""
        if left_out:
            for state in self.state.values():
                state["step"] -= left_out
        self._left_out = None

    def _updates_left_out(self, device: torch.device) -> Tensor:
        """How many updates since `settle` were not selected, float32 (), on the device."""
        return torch.zeros((), device=device) if self._left_out is None else self._left_out

    def _selected_update(
        self, group: ParameterGroup, count: int, tensors: list[list[Tensor]], selected: Tensor
    ) -> list[Tensor]:
        """The `count`-th update on copies, of which the device takes the new values or keeps the old ones."""
        parameters, gradients, stored, second = tensors
        copies = [[tensor.clone() for tensor in each] for each in (parameters, stored, second)]
        made = count - self._updates_left_out(selected.device)
        squares = self._update(group, made, copies[0], gradients, copies[1], copies[2])
        for old, new in zip((parameters, stored, second), copies, strict=True):
            torch._foreach_copy_(old, [torch.where(selected, n, o) for n, o in zip(new, old, strict=True)])
        return squares

    def _fused_update(
        self, group: ParameterGroup, count: int, rows: Iterable[list[Tensor]], selected: Tensor
    ) -> Tensor:
        """The `count`-th update as one pass over memory; returns its squared norm."""
        from openvision.training.optimizer import triton_adam

        parameters, gradients, first, second = (list(column) for column in zip(*rows, strict=True))
        made = count - self._updates_left_out(selected.device)
        constants = triton_adam.Constants(*group["betas"], group["eps"], group["weight_decay"], group["lr"])
        return triton_adam.fused_update(parameters, gradients, first, second, made, constants, selected)

    def _count(self, parameter: Tensor) -> None:
        """Count this update of the parameter; the first one makes the moments."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.first_moment)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1

    def _flat(self, parameter: Tensor) -> list[Tensor]:
        """This process's elements of parameter, gradient and both moments, each as one row."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        moments = (local_tensor(state[name]).view(-1) for name in ("exp_avg", "exp_avg_sq"))
        return [local_tensor(parameter).view(-1), local_tensor(gradient).reshape(-1), *moments]

    def _update(
        self,
        group: ParameterGroup,
        count: int | Tensor,
        parameters: list[Tensor],
        gradients: list[Tensor],
        stored: list[Tensor],
        second: list[Tensor],
    ) -> list[Tensor]:
        """The `count`-th update of some tensors; returns its squared norm, if that is measured."""
        beta1, beta2 = group["betas"]
        # The original multiplies the stored moment by beta1 rounded to the storage dtype, and rounds the product.
        decayed = torch._foreach_mul(stored, torch.tensor(beta1, dtype=self.first_moment).item())
        first = [moment.float() for moment in decayed] if self.first_moment != torch.float32 else list(decayed)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_copy_(stored, first)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)

        denominator = torch._foreach_div(second, 1 - beta2**count)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_div_(first, 1 - beta1**count)
        torch._foreach_div_(first, denominator)
        if group["weight_decay"]:
            torch._foreach_add_(first, parameters, alpha=group["weight_decay"])
        torch._foreach_add_(parameters, first, alpha=-group["lr"])
        return [(torch.stack(torch._foreach_norm(first)).norm() * group["lr"]) ** 2] if self.measure else []


def _has_kernel(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernel of triton_adam.py updates these parameters: float32 on CUDA, where Triton is installed."""
    if not tensors or not tensors[0].is_cuda or not HAS_TRITON:
        return False
    return all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)


def tiles(rows: Iterable[Sequence[Tensor]], elements: int) -> Iterator[list[list[Tensor]]]:
    """Cut rows of flat tensors, all tensors of a row equally long, into tiles of at most `elements` elements.

    A tile is a list for each place of a row: with rows of (parameter, gradient) a list of views of parameters and one
    of views of gradients.
    """
    room, tile = elements, []
    for row in rows:
        start, length = 0, len(row[0])
        while start < length:
            end = min(length, start + room)
            tile.append([tensor[start:end] for tensor in row])
            room, start = room - -(-(end - start) // VECTOR) * VECTOR, end
            if room <= 0:
                yield [list(column) for column in zip(*tile, strict=True)]
                room, tile = elements, []
    if tile:
        yield [list(column) for column in zip(*tile, strict=True)]


def with_gradient(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimizer that have a gradient, group by group."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter for parameter in parameters if parameter.grad is not None]

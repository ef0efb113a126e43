"""Muon: updates of a block's matrices are made orthogonal; everything else is updated by Adam.

The update of a matrix is its momentum with all singular values near one, found by five Newton-Schulz iterations (Jordan
et al. 2024, https://kellerjordan.github.io/posts/muon). Scaled by 0.2 sqrt(longer side) it is as large as Adam's is on
average, so both take one learning rate and one weight decay (Liu et al. 2025, arXiv:2502.16982). Query, key and value
weights are matrices of their own, though stored as one.

A sharded matrix is gathered, made orthogonal by every process alike, and cut again.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from openvision.runtime import local_tensor
from openvision.training.optimizer.adam import Adam, ParameterGroup

MOMENTUM = "momentum"
"""Name of the momentum in the optimizer's state."""
_BETA = 0.95
_SCALE = 0.2
# Coefficients that raise small singular values fastest; the result lies between about 0.7 and 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


class Muon(Adam):
    """Adam, whose groups with `parts` hold matrices that are updated by Muon: each is a stack of so many matrices."""

    def __init__(
        self,
        groups: Iterable[dict[str, object]],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        first_moment: torch.dtype = torch.bfloat16,
        multiplied_in: torch.dtype = torch.float32,
    ) -> None:
        """As for `Adam`; `first_moment` stores the momentum too, `multiplied_in` is for `newton_schulz`."""
        super().__init__(groups, betas, eps, first_moment)
        self.multiplied_in = multiplied_in

    def _update_group(
        self, group: ParameterGroup, trained: list[nn.Parameter], selected: Tensor | None
    ) -> list[Tensor]:
        parts = group.get("parts")
        if not parts or not trained:
            return super()._update_group(group, trained, selected)
        stored = [self._momentum(parameter) for parameter in trained]
        momenta, directions = [], []
        for parameter, momentum in zip(trained, stored, strict=True):
            assert parameter.grad is not None
            new = momentum.float().mul_(_BETA).add_(parameter.grad)
            momenta.append(local_tensor(new))
            # Nesterov: a step ahead of the momentum.
            ahead = parameter.grad.float() + _BETA * new
            directions.append(ahead.full_tensor() if isinstance(ahead, DTensor) else ahead)
        squares = []
        for parameter, momentum, new, whole in zip(
            trained, stored, momenta, orthogonal(directions, parts, self.multiplied_in), strict=True
        ):
            update, value = _cut_like(parameter, whole), local_tensor(parameter)
            if group["weight_decay"]:
                update = update + group["weight_decay"] * value
            _assign(value, value - group["lr"] * update, selected)
            _assign(local_tensor(momentum), new.to(momentum.dtype), selected)
            if self.measure:
                squares.append((update.norm() * group["lr"]) ** 2)
        return squares

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """The stored momentum of a parameter, made with its first update, which is counted."""
        state = self.state[parameter]
        if MOMENTUM not in state:
            state["step"] = 0
            state[MOMENTUM] = torch.zeros_like(parameter, dtype=self.first_moment)
        state["step"] += 1
        return state[MOMENTUM]


def orthogonal(matrices: Sequence[Tensor], parts: int = 1, multiplied_in: torch.dtype = torch.float32) -> list[Tensor]:
    """Matrices with all singular values near `0.2 sqrt(longer side)`, float32, in the shapes of the given ones.

    Args:
        matrices: float32 (R, C) each; equal shapes are computed together.
        parts: R is a stack of so many matrices of R / parts rows, each made orthogonal by itself.
        multiplied_in: as for `newton_schulz`.
    """
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(index)
    found: dict[int, Tensor] = {}
    for (rows, columns), indices in by_shape.items():
        stack = torch.stack([matrices[index] for index in indices]).view(-1, rows // parts, columns)
        whole = newton_schulz(stack, multiplied_in) * (_SCALE * max(rows // parts, columns) ** 0.5)
        found |= dict(zip(indices, whole.view(len(indices), rows, columns), strict=True))
    return [found[index] for index in range(len(matrices))]


def newton_schulz(matrices: Tensor, multiplied_in: torch.dtype = torch.float32) -> Tensor:
    """Singular values near one and the singular vectors of `matrices`: (N, R, C) -> (N, R, C) float32.

    bfloat16 is precise enough for a run in bfloat16: a third of the time of float32 on a CPU with its instructions.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(multiplied_in)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if tall else x).float()


def _cut_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """This process's part of a matrix that every process holds."""
    if not isinstance(parameter, DTensor):
        return whole
    return local_tensor(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))


def _assign(old: Tensor, new: Tensor, selected: Tensor | None) -> None:
    """Take the new values, or where `selected` is false keep the old ones: the host need not know."""
    old.copy_(new if selected is None else torch.where(selected, new, old))

"""Adam and the learning-rate schedule of the original (spec section 5).

- Decoupled weight decay on matrices only; the first moment is stored in bfloat16.
- The first moment is rounded for storage only: the step uses the float32 value before rounding.
- Decay covers every kernel (patch convolution, attention, MLP, heads, decoder projections) and spares biases,
  norms, embeddings, positions, class token, queries and logit scale.
- Tensors are updated together by fused list operations: a small model has hundreds of tiny tensors. On a CPU large
  ones are cut, so that the dozen operations on a piece find it in the cache; no number changes by it.
- Off by default: a limit on the gradient's norm, and an average of the parameters (EMA) kept beside the moments.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.recipe.schema import Optimizer as OptimizerRecipe
from openvision.recipe.schema import Stage


def learning_rate(stage: Stage, step: int) -> float:
    """Learning rate of the update after `step` finished updates of `stage`; the first one is 0 under warm-up."""
    total, warmup = stage.steps, stage.warmup_steps
    progress = min(max((step - warmup) / (total - warmup), 0.0), 1.0)
    ramp = min(1.0, step / warmup) if warmup else 1.0
    return stage.peak_learning_rate * ramp * 0.5 * (1 + math.cos(math.pi * progress))


# Elements updated at a time on a CPU, few enough to stay near its caches between the operations on them.
PIECE_ON_CPU = 2**17
VECTORS = 64
AVERAGE = "average"


@dataclass(frozen=True)
class Norms:
    """Euclidean norms over all parameters, 0-d tensors on their device."""

    gradient: Tensor
    """Before it is clipped."""
    parameter: Tensor
    """Before the update."""
    update: Tensor
    """Of what was added to the parameters."""


class Adam(torch.optim.Optimizer):
    """Adam whose first moment may be kept in bfloat16."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        first_moment: torch.dtype = torch.bfloat16,
        clip_norm: float | None = None,
        ema: float | None = None,
    ) -> None:
        """`clip_norm` limits the gradient's norm; `ema` is the decay of the averaged parameters; None is off."""
        self.first_moment = first_moment
        self.clip_norm = clip_norm
        self.ema = ema
        self.measure = False
        """Whether the next update leaves its norms in `norms`."""
        self.norms: Norms | None = None
        self._gradient_norm: Tensor | None = None
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Norm of the gradient as it is now, over all shards; the next update does not compute it again."""
        norm = _norm([p.grad for group in self.param_groups for p in _with_gradient(group)])
        self._gradient_norm = norm
        return norm

    def update(self, learning_rate: float, measure: bool = False) -> None:
        """Take a step with this learning rate; `measure` leaves its norms in `norms`."""
        self.measure = measure
        for group in self.param_groups:
            group["lr"] = learning_rate
        self.step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        trained = [parameter for group in self.param_groups for parameter in _with_gradient(group)]
        gradient = self._clip([parameter.grad for parameter in trained if parameter.grad is not None])
        weight = _norm(trained) if self.measure else None
        squares: list[Tensor] = []
        for group in self.param_groups:
            for pieces in self._pieces(_with_gradient(group)):
                self._update(group, *pieces, squares)
        if gradient is not None and weight is not None:
            self.norms = Norms(gradient, weight, _over_shards(torch.stack(squares).sum(), _a_shard(trained)).sqrt())

    def _clip(self, gradients: list[Tensor]) -> Tensor | None:
        """Scale the gradients down to the norm allowed; their norm where anybody wants to know it."""
        known, self._gradient_norm = self._gradient_norm, None
        if not gradients or (self.clip_norm is None and not self.measure):
            return None
        norm = _norm(gradients) if known is None else known
        if self.clip_norm is not None:
            torch._foreach_mul_([_local(g) for g in gradients], (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _pieces(self, parameters: list[nn.Parameter]) -> Iterator[tuple[int, dict[str, list[Tensor]]]]:
        """Number of the step, and flat views of parameters, gradients and states, as many as fit into the cache."""
        on_cpu = parameters and parameters[0].device.type == "cpu"
        limit = PIECE_ON_CPU if on_cpu else 2**63
        room, step, lists = limit, 0, _empty()
        for parameter in parameters:
            state = self._state_of(parameter)
            state["step"] += 1
            if step and step != state["step"]:
                yield step, lists
                room, lists = limit, _empty()
            step = state["step"]
            assert parameter.grad is not None
            flat = {name: _local(tensor).view(-1) for name, tensor in _moments(state).items()}
            flat |= {"parameter": _local(parameter).view(-1), "gradient": _local(parameter.grad).reshape(-1)}
            start, length = 0, len(flat["parameter"])
            while start < length:
                end = min(length, start + room)
                for name, tensor in flat.items():
                    lists[name].append(tensor[start:end])
                # A whole number of vectors: a cut elsewhere would send elements through the scalar code.
                room, start = room - -(-(end - start) // VECTORS) * VECTORS, end
                if room <= 0:
                    yield step, lists
                    room, lists = limit, _empty()
        if lists["parameter"]:
            yield step, lists

    def _update(self, group: dict[str, Any], step: int, lists: dict[str, list[Tensor]], squares: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        parameters, gradients, stored, second = (lists[k] for k in ("parameter", "gradient", "exp_avg", "exp_avg_sq"))
        # The original multiplies the stored moment by beta1 rounded to the storage dtype, and rounds the product.
        decayed = torch._foreach_mul(stored, torch.tensor(beta1, dtype=self.first_moment).item())
        first = [moment.float() for moment in decayed] if self.first_moment != torch.float32 else list(decayed)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_copy_(stored, first)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)

        denominator = torch._foreach_div(second, 1 - beta2**step)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_div_(first, 1 - beta1**step)
        torch._foreach_div_(first, denominator)
        if group["weight_decay"]:
            torch._foreach_add_(first, parameters, alpha=group["weight_decay"])
        if self.measure:
            squares.append((torch.stack(torch._foreach_norm(first)).norm() * group["lr"]) ** 2)
        torch._foreach_add_(parameters, first, alpha=-group["lr"])
        if self.ema is not None:
            torch._foreach_lerp_(lists[AVERAGE], parameters, 1 - self.ema)

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.first_moment)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        if self.ema is not None and AVERAGE not in state:
            state[AVERAGE] = parameter.detach().clone()
        return state

    def require_finite(self) -> None:
        """Raise OpenVisionError when a parameter is NaN or infinite: such a state must not replace a good one."""
        parameters = [parameter.detach() for group in self.param_groups for parameter in group["params"]]
        if not _norm(parameters).isfinite():
            raise OpenVisionError(
                "the parameters are no longer finite and not saved; the last good checkpoint is kept. Lower the "
                "learning rate, or set optimizer.clip_norm, and start from there"
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Averaged parameters in place of the trained ones while the context lasts; nothing without EMA."""
        averages = {parameter: state[AVERAGE] for parameter, state in self.state.items() if AVERAGE in state}
        self._exchange(averages)
        try:
            yield
        finally:
            self._exchange(averages)

    @torch.no_grad()
    def _exchange(self, averages: dict[Tensor, Tensor]) -> None:
        for parameter, average in averages.items():
            trained = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(trained)


def is_decayed(module: nn.Module, name: str) -> bool:
    """Whether weight decay applies to the parameter `name` of `module`: weights of linear maps and convolutions."""
    return name == "weight" and isinstance(module, (nn.Linear, nn.Conv2d))


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> Adam:
    """Adam over all parameters of `model`, in two groups: decayed and not."""
    decayed, spared = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (decayed if is_decayed(module, name) else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    dtype = getattr(torch, recipe.first_moment)
    return Adam(groups, recipe.betas, recipe.eps, dtype, clip_norm=recipe.clip_norm, ema=recipe.ema)


def _with_gradient(group: dict[str, Any]) -> list[nn.Parameter]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _empty() -> dict[str, list[Tensor]]:
    return {name: [] for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq", AVERAGE)}


def _moments(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor; their module takes a second to import, which only runs that shard should pay."""
    return hasattr(tensor, "to_local")


def _a_shard(tensors: list[Any]) -> Any:
    """A sharded one of the tensors, where there is any."""
    return next((tensor for tensor in tensors if _is_sharded(tensor)), tensors[0])


def _local(tensor: Any) -> Tensor:
    """This process's shard of a sharded tensor, whose update needs no other; else the tensor itself."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _over_shards(share: Tensor, of: Any) -> Tensor:
    """The sum of every process's `share` over the shards of the parameter `of`."""
    if not _is_sharded(of):
        return share
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if placement.is_shard() else Replicate() for placement in of.placements]
    return DTensor.from_local(share, of.device_mesh, placements).full_tensor()


def _norm(tensors: list[Any]) -> Any:
    """Euclidean norm of all elements, over all shards; single numbers are not sharded where matrices are."""
    sharded = [tensor for tensor in tensors if _is_sharded(tensor)]
    if not sharded:
        return torch.nn.utils.get_total_norm(tensors)
    parts = [torch.nn.utils.get_total_norm(sharded).full_tensor()]  # pyright: ignore[reportAttributeAccessIssue]
    if whole := [tensor for tensor in tensors if not _is_sharded(tensor)]:
        parts.append(torch.nn.utils.get_total_norm(whole))
    return torch.stack(parts).norm()

"""Adam as the original runs it: decoupled decay on matrices only, first moment stored in bfloat16 (spec section 5).

- The first moment is rounded for storage only: the step uses the float32 value before rounding.
- Decay covers every kernel (patch convolution, attention, MLP, heads, decoder projections) and spares biases,
  norms, embeddings, positions, class token, queries and temperature.
- All tensors are updated together by fused list operations: a small model has hundreds of tiny tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from openvision.training.recipe import Optimizer as OptimizerRecipe


class Adam(torch.optim.Optimizer):
    """Adam whose first moment may be kept in bfloat16."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        first_moment: torch.dtype = torch.bfloat16,
    ) -> None:
        self.first_moment = first_moment
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        states = [self._state_of(parameter) for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        step = states[0]["step"] + 1
        for state in states:
            state["step"] = step
        stored = [state["exp_avg"] for state in states]
        # The original multiplies the stored moment by beta1 rounded to the storage dtype, and rounds the product.
        decayed = torch._foreach_mul(stored, torch.tensor(beta1, dtype=self.first_moment).item())
        first = [moment.float() for moment in decayed] if self.first_moment != torch.float32 else list(decayed)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_copy_(stored, first)
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)

        denominator = torch._foreach_div(second, 1 - beta2**step)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        direction = torch._foreach_div(first, 1 - beta1**step)
        torch._foreach_div_(direction, denominator)
        if group["weight_decay"]:
            torch._foreach_add_(direction, parameters, alpha=group["weight_decay"])
        torch._foreach_add_(parameters, direction, alpha=-group["lr"])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.first_moment)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


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
    return Adam(groups, recipe.betas, recipe.eps, getattr(torch, recipe.first_moment))

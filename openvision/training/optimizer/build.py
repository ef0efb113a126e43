"""Which parameters are updated how: the optimizer of a recipe, and its learning rate over time."""

import math
from typing import Any

import torch
from torch import nn

from openvision.models.layers import Attention, Block
from openvision.recipe.sections import Optimizer as OptimizerRecipe
from openvision.training.optimizer.adam import Adam
from openvision.training.optimizer.muon import Muon

QUERY_KEY_VALUE = 3


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate of the update after `step` of `steps` updates: linear warm-up from 0 to `peak`, cosine to 0."""
    progress = min(max((step - warmup_steps) / (steps - warmup_steps), 0.0), 1.0)
    ramp = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return peak * ramp * 0.5 * (1 + math.cos(math.pi * progress))


def is_decayed(module: nn.Module, name: str) -> bool:
    """Whether weight decay applies to the parameter `name` of `module`: weights of linear maps and convolutions."""
    return name == "weight" and isinstance(module, (nn.Linear, nn.Conv2d))


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe, precision: torch.dtype = torch.float32) -> Adam:
    """Adam over all parameters of `model`, decayed and not; with Muon the matrices inside blocks are apart.

    Towers whose learning rate is multiplied have groups of their own. `precision` is that of the run.
    """
    decayed, spared = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (decayed if is_decayed(module, name) else spared).append(parameter)
    moment = getattr(torch, recipe.first_moment)
    factors = _multipliers(model, recipe)
    if recipe.kind == "adam":
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        return Adam(_by_multiplier(groups, factors), recipe.betas, recipe.eps, moment)
    parts = _matrices_of_blocks(model)
    groups = [{"params": spared, "weight_decay": 0.0}]
    for count in (0, 1, QUERY_KEY_VALUE):
        alike = [parameter for parameter in decayed if parts.get(id(parameter), 0) == count]
        groups.append({"params": alike, "weight_decay": recipe.weight_decay, "parts": count})
    return Muon(_by_multiplier(groups, factors), recipe.betas, recipe.eps, moment, precision)


def _multipliers(model: nn.Module, recipe: OptimizerRecipe) -> dict[int, float]:
    """Factor on the learning rate of parameters, by their id, where it is not 1."""
    towers = recipe.multipliers.model_dump()
    found = {}
    for name, parameter in model.named_parameters():
        factor = towers.get(name.partition(".")[0], 1.0)
        if factor != 1:
            found[id(parameter)] = factor
    return found


def _by_multiplier(groups: list[dict[str, Any]], factors: dict[int, float]) -> list[dict[str, Any]]:
    """The groups divided by the multiplier of their parameters; the same groups where there are none."""
    if not factors:
        return groups
    divided = []
    for group in groups:
        for factor in sorted({factors.get(id(parameter), 1.0) for parameter in group["params"]}):
            alike = [parameter for parameter in group["params"] if factors.get(id(parameter), 1.0) == factor]
            divided.append({**group, "params": alike, "multiplier": factor})
    return divided


def _matrices_of_blocks(model: nn.Module) -> dict[int, int]:
    """Of every matrix inside a block, by its id, how many matrices it is a stack of."""
    found = {}
    for block in model.modules():
        if isinstance(block, Block):
            found |= {id(each.weight): 1 for each in block.modules() if isinstance(each, nn.Linear)}
            attentions = [each for each in block.modules() if isinstance(each, Attention)]
            found |= {id(each.qkv.weight): QUERY_KEY_VALUE for each in attentions}
    return found

"""How many parameters a model has and where they are, counted on the meta device."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from openvision.models.openvision2 import ModelConfig, build_model


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    towers: dict[str, int]
    """By tower: "vision", "text", "decoder"; what is trained beside the model; the temperature counts for none."""
    total: int
    in_blocks: int
    """Those of transformer blocks: what bf16 copies are made of, and what sharding gathers block by block."""
    largest_block: int
    bodies: dict[str, int]
    """By tower without its projection into the shared space: what `warm_start.frozen` leaves as it is."""
    frozen: dict[str, int] = field(default_factory=dict)
    """Teachers and averaged towers, which are kept beside the model and not trained."""

    @property
    def outside_blocks(self) -> int:
        """Token tables, positions, heads, projections."""
        return self.total - self.in_blocks


def count_parameters(
    config: ModelConfig, trained: Mapping[str, int] | None = None, frozen: Mapping[str, int] | None = None
) -> Parameters:
    """Build the model without memory and count; `trained` and `frozen` are beside it."""
    with torch.device("meta"):
        model = build_model(config)
    towers = {name: _count(tower) for name, tower in model.named_children()}
    blocks = [_count(block) for tower in model.children() for block in getattr(tower, "blocks", ())]
    beside = dict(trained or {})
    total = _count(model) + sum(beside.values())
    bodies = {name: count - _count(getattr(model.get_submodule(name), "head", None)) for name, count in towers.items()}
    return Parameters(towers | beside, total, sum(blocks), max(blocks), bodies, dict(frozen or {}))


def _count(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0

"""The three modules of a LLaVA-style model: which train, at which rate, and LoRA inside the language model."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from openvision.errors import OpenVisionError, require
from openvision.multimodal.recipe import LearningRates, Lora


def module_of(name: str) -> str:
    """projector, encoder or llm, by a parameter's name in the whole model."""
    if "vision_tower" in name:
        return "encoder"
    return "projector" if "multi_modal_projector" in name or "image_newline" in name else "llm"


def choose_trained(model: nn.Module, rates: LearningRates, lora: Lora | None) -> None:
    """Set `requires_grad` by the stage's learning rates; with LoRA only its matrices train in the language model.

    What lies behind the layer the projector reads gets no gradient and stays frozen: distributed training would wait
    for it.
    """
    wanted = {module for module, rate in rates.model_dump().items() if rate is not None}
    unread = set(_unread(model))
    for name, parameter in model.named_parameters():
        module = module_of(name)
        is_lora = "lora_" in name
        trained = module in wanted and (module != "llm" or lora is None or is_lora)
        parameter.requires_grad_(trained and id(parameter) not in unread)


def _unread(model: Any) -> Iterator[int]:
    """Ids of the tower's parameters behind the chosen layer, final norm and pooler included."""
    tower, config = model.model.vision_tower, model.config
    depth = config.vision_config.num_hidden_layers
    layer = config.vision_feature_layer
    read = layer if layer >= 0 else depth + 1 + layer
    for name, parameter in tower.named_parameters():
        block = _block_number(name)
        behind = block >= read if block is not None else "embeddings" not in name and "pre_layrnorm" not in name
        if behind:
            yield id(parameter)


def _block_number(name: str) -> int | None:
    """Of a parameter in the tower, by its name in any of the stock towers: `...layers.3...` or `...layer.3...`."""
    parts = name.split(".")
    for before, part in pairwise(parts):
        if before in ("layers", "layer") and part.isdigit():
            return int(part)
    return None


def parameter_groups(model: nn.Module, rates: LearningRates, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for the optimizer, one a module; vectors are never decayed."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((module_of(name), parameter.ndim > 1), []).append(parameter)
    rate = rates.model_dump()
    return [
        {"params": found, "lr": rate[module], "weight_decay": weight_decay if matrices else 0.0, "module": module}
        for (module, matrices), found in groups.items()
    ]


def add_lora(model: Any, lora: Lora, seed: int) -> None:
    """Put low-rank matrices beside the language model's layers, in place; raises OpenVisionError when none fits."""
    peft = require("peft", extra="vlm")
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model.model.language_model)
    except ValueError as error:
        raise OpenVisionError(
            f"stages.lora.targets {list(lora.targets)} name no linear layer of the language model"
        ) from error


def merge_lora(model: Any) -> None:
    """Add the matrices to the weights they stand beside, and take them out."""
    layer_type = require("peft.tuners.lora", extra="vlm").LoraLayer
    language = model.model.language_model
    found = [(name, module) for name, module in language.named_modules() if isinstance(module, layer_type)]
    for name, module in found:
        module.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(language.get_submodule(parent), leaf, module.get_base_layer())

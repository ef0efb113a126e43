"""Trained modules of a LLaVA model: projector, language model and encoder, their learning rates, and LoRA."""

from collections.abc import Iterator
from itertools import pairwise
from typing import TypedDict

import torch
from torch import nn

from openvision.errors import OpenVisionError, require
from openvision.multimodal.model.huggingface import Llava
from openvision.multimodal.recipe import LearningRates, Lora

_BEFORE_BLOCKS = ("embeddings", "pre_layrnorm", "patch_embed", "cls_token")


def module_of(name: str) -> str:
    """Module of a parameter, by its name in the model: projector, encoder or llm."""
    if "vision_tower" in name:
        return "encoder"
    return "projector" if "multi_modal_projector" in name or "image_newline" in name else "llm"


def choose_trained(model: Llava, rates: LearningRates, lora: Lora | None) -> None:
    """Set `requires_grad` by the stage's learning rates; with LoRA, only its matrices of the language model train.

    Layers of the tower after the one that the projector reads get no gradient and stay frozen, because DDP would wait
    for them.
    """
    wanted = {module for module, rate in rates.model_dump().items() if rate is not None}
    unread = set(_unread(model))
    for name, parameter in model.named_parameters():
        module = module_of(name)
        is_lora = "lora_" in name
        trained = module in wanted and (module != "llm" or lora is None or is_lora)
        parameter.requires_grad_(trained and id(parameter) not in unread)


def _unread(model: Llava) -> Iterator[int]:
    """Ids of the tower's parameters after the layer that the projector reads, final norm and pooler included."""
    tower, config = model.model.vision_tower, model.config
    depth = config.vision_config.num_hidden_layers
    layer = config.vision_feature_layer
    read = layer if layer >= 0 else depth + 1 + layer
    for name, parameter in tower.named_parameters():
        block = _block_number(name)
        after = block >= read if block is not None else not any(part in name for part in _BEFORE_BLOCKS)
        if after:
            yield id(parameter)


def _block_number(name: str) -> int | None:
    """Block of a parameter in any tower, by its name: `...layers.3...`, `...layer.3...` or `...blocks.3...`."""
    parts = name.split(".")
    for before, part in pairwise(parts):
        if before in ("layers", "layer", "blocks") and part.isdigit():
            return int(part)
    return None


class ParameterGroup(TypedDict):
    """A parameter group of the optimizer."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    module: str


def parameter_groups(model: nn.Module, rates: LearningRates, weight_decay: float) -> list[ParameterGroup]:
    """Parameter groups of each module, matrices and vectors apart; vectors have no weight decay."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((module_of(name), parameter.ndim > 1), []).append(parameter)
    rate = rates.model_dump()
    return [
        {"params": found, "lr": rate[module], "weight_decay": weight_decay if matrices else 0.0, "module": module}
        for (module, matrices), found in groups.items()
    ]


def add_lora(model: Llava, lora: Lora, seed: int) -> None:
    """Add LoRA to the language model in place; raises OpenVisionError when no layer has one of the target names."""
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
            f"stages.lora.targets {list(lora.targets)} name no linear layer of the language model; "
            "list names of its layers"
        ) from error


def merge_lora(model: Llava) -> None:
    """Merge LoRA into the weights and remove its layers."""
    layer_type = require("peft.tuners.lora", extra="vlm").LoraLayer
    language = model.model.language_model
    for name, layer in list(language.named_modules()):
        if isinstance(layer, layer_type):
            layer.merge()  # pyright: ignore[reportCallIssue]
            language.set_submodule(name, layer.get_base_layer())  # pyright: ignore[reportCallIssue]

"""A tower that no stock class of transformers can hold, as a model of transformers: GenLIP's, or one behind an
autoencoder (OpenVision 3), whose encoding half is part of it.

Importing this registers the class with transformers' Auto classes; a stock program that loads such a folder imports
this module first. `load_assistant` and `tower_of` do.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from openvision.errors import require
from openvision.files import JsonObject
from openvision.frozen.autoencoder import FromDiffusers, Pixels, open_autoencoder
from openvision.frozen.config import AutoencoderConfig
from openvision.frozen.conv import ConvAutoencoder, ConvConfig
from openvision.models.openvision3 import LatentVisionConfig, build_vision, vision_config
from openvision.models.vision import VisionTransformer

MODEL_TYPE = "openvision_tower"
_INSIDE = "inside the tower"
"""Source of an autoencoder that is part of the model."""


class OpenVisionTowerConfig(PretrainedConfig):
    """Shape of the tower, as our own configurations write it, and the few names that LLaVA reads."""

    model_type = MODEL_TYPE

    def __init__(self, tower: JsonObject | None = None, autoencoder: JsonObject | None = None, **rest: Any) -> None:
        """`tower` is `asdict` of a VisionConfig; `autoencoder` the shape of a network that has one, else None."""
        super().__init__(**rest)
        self.tower, self.autoencoder = tower or {}, autoencoder
        if tower:
            self.hidden_size, self.num_hidden_layers = tower["width"], tower["depth"]
            self.num_attention_heads, self.intermediate_size = tower["heads"], tower["mlp_dim"]
            self.image_size, self.patch_size = tower["image_size"], tower["patch_size"]


class OpenVisionTower(PreTrainedModel):
    """Normalised images to the hidden states of all blocks."""

    config_class = OpenVisionTowerConfig
    config: OpenVisionTowerConfig
    main_input_name = "pixel_values"
    base_model_prefix = "openvision"
    supports_gradient_checkpointing = False

    def __init__(self, config: OpenVisionTowerConfig) -> None:
        super().__init__(config)
        shape = vision_config(config.tower)
        self.tower = build_vision(shape, None)
        self.autoencoder = _empty_network(shape, config.autoencoder)
        if self.autoencoder is not None:
            self.autoencoder.requires_grad_(False)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutputWithPooling:
        """Images (B, 3, H, W), normalised as the processor does -> hidden states (B, prefix + N, D) of every layer."""
        shape = self.tower.config
        images = pixel_values
        if self.autoencoder is not None and isinstance(shape, LatentVisionConfig):
            with torch.no_grad():
                images = self.autoencoder.encode(pixel_values).float() * shape.autoencoder.scale  # pyright: ignore[reportCallIssue]
        features = self.tower.forward_features(images, layers=range(shape.depth + 1))
        states = tuple(
            layer.patch_tokens
            if layer.class_token is None
            else torch.cat([layer.class_token[:, None], layer.patch_tokens], dim=1)
            for layer in features.layers
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],  # pyright: ignore[reportArgumentType]
            pooler_output=features.pooled,  # pyright: ignore[reportArgumentType]
            hidden_states=states,  # pyright: ignore[reportArgumentType]
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights come from a file, or from the tower that `wrap` is given."""


def wrap(vision: VisionTransformer) -> OpenVisionTower:
    """A tower of ours as a model of transformers; it shares the weights, and those of the autoencoder."""
    shape, network, settings = vision.config, None, None
    if isinstance(shape, LatentVisionConfig):
        whole = open_autoencoder(shape.autoencoder).network
        network, settings = _encoding_half(whole)
    content = asdict(shape)
    if content.get("autoencoder", {}).get("source") is not None:
        # The path of this machine, or the name of what is inside now.
        content["autoencoder"]["source"] = _INSIDE
    with torch.device("meta"):
        model = OpenVisionTower(OpenVisionTowerConfig(content, settings))
    head, vision.head = vision.head, None
    state = {f"tower.{name}": tensor for name, tensor in vision.state_dict().items()}
    vision.head = head
    if network is not None:
        state |= {f"autoencoder.{name}": tensor for name, tensor in network.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _encoding_half(network: nn.Module) -> tuple[Mapping[str, Tensor], JsonObject | None]:
    """Tensors of an autoencoder that encoding needs, and its shape."""
    state = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.removeprefix("model.").startswith(("decoder.", "post_quant_conv."))
    }
    if isinstance(network, ConvAutoencoder):
        return state, {"conv": asdict(network.config)}
    if isinstance(network, FromDiffusers):
        shape = {name: value for name, value in dict(network.model.config).items() if not name.startswith("_")}  # pyright: ignore[reportCallIssue, reportArgumentType]
        return state, {"diffusers": shape}
    return {}, None


def _empty_network(shape: object, settings: JsonObject | None) -> nn.Module | None:
    """The encoding half of an autoencoder, to be filled; None for a tower on pixels."""
    if not isinstance(shape, LatentVisionConfig):
        return None
    config: AutoencoderConfig = shape.autoencoder
    if settings is None:
        return Pixels(config.factor)
    if "conv" in settings:
        conv = settings["conv"]
        network = ConvAutoencoder(ConvConfig(**{**conv, "widths": tuple(conv["widths"])}))
        del network.decoder
        return network
    model = require("diffusers", extra="reconstruction").AutoencoderKL(**settings["diffusers"])
    del model.decoder, model.post_quant_conv
    return FromDiffusers(model)


AutoConfig.register(MODEL_TYPE, OpenVisionTowerConfig)
AutoModel.register(OpenVisionTowerConfig, OpenVisionTower)

"""A tower that no stock class of transformers can hold, as a model of transformers: GenLIP's, one behind an autoencoder
(OpenVision 3), whose encoding half is part of it, and any of ours that reads images of native shapes.

A program that loads such a folder with stock classes calls `register` first; `load_assistant` and `tower_of` do.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from openvision.errors import require
from openvision.files import JsonObject
from openvision.frozen.autoencoder import FromDiffusers, Pixels, open_autoencoder
from openvision.frozen.conv import ConvAutoencoder, ConvConfig
from openvision.images.native import rows_by_shape
from openvision.models.openvision3 import LatentVisionConfig, build_vision, vision_config
from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.multimodal.model.huggingface import Pretrained, transformers

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

MODEL_TYPE = "openvision_tower"
_INSIDE = "inside the tower"
"""Source of an autoencoder that is part of the model."""


class _Tower(nn.Module):
    """Normalised images to the hidden states of all blocks; `register` makes it a model of transformers."""

    tower: VisionTransformer
    autoencoder: nn.Module | None

    with_prefix: bool
    """Whether hidden states hold the tokens before the patches; not in native shapes."""

    def forward(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **_: object
    ) -> "BaseModelOutputWithPooling":
        """Images (B, 3, H, W), normalised as the processor does -> hidden states (B, prefix + N, D) of every layer.

        With `image_sizes`, int64 (B, 2), an image is the top left of its row, and the states are those of all images
        one behind the other, (1, sum of N, D), as stock LLaVA splits them again.
        """
        output = transformers().modeling_outputs.BaseModelOutputWithPooling
        if image_sizes is None:
            states, pooled = self._states(pixel_values)
            return output(last_hidden_state=states[-1], pooler_output=pooled, hidden_states=states)
        found: dict[int, tuple[Tensor, ...]] = {}
        for (height, width), rows in rows_by_shape([(tall, wide) for tall, wide in image_sizes.tolist()]).items():
            states, _pooled = self._states(pixel_values[rows, :, :height, :width])
            found |= {row: tuple(layer[place] for layer in states) for place, row in enumerate(rows)}
        joined = tuple(
            torch.cat(tokens)[None] for tokens in zip(*(found[row] for row in range(len(found))), strict=True)
        )
        return output(last_hidden_state=joined[-1], hidden_states=joined)

    def _states(self, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Hidden states of every layer, (B, prefix + N, D), and the pooled vectors, for images of one shape."""
        shape = self.tower.config
        images = pixel_values
        if self.autoencoder is not None and isinstance(shape, LatentVisionConfig):
            with torch.no_grad():
                images = self.autoencoder.encode(pixel_values).float() * shape.autoencoder.scale  # pyright: ignore[reportCallIssue]
        features = self.tower.forward_features(images, layers=range(shape.depth + 1))
        states = tuple(
            layer.patch_tokens
            if layer.class_token is None or not self.with_prefix
            else torch.cat([layer.class_token[:, None], layer.patch_tokens], dim=1)
            for layer in features.layers
        )
        return states, features.pooled


@cache
def register() -> tuple[type[Any], type[Any]]:
    """Configuration and model as transformers' Auto classes find them from now on, by their `model_type`."""
    library = transformers()

    class OpenVisionTowerConfig(library.PretrainedConfig):
        """Shape of the tower, as our own configurations write it, and the few names that LLaVA reads."""

        model_type = MODEL_TYPE

        def __init__(
            self,
            tower: JsonObject | None = None,
            autoencoder: JsonObject | None = None,
            native: JsonObject | None = None,
            **rest: Any,
        ) -> None:
            """`tower` is `asdict` of a VisionConfig; `autoencoder` the shape of a network that has one, else None.

            `native` has the budget of patches, `max_tokens`, of images that keep their aspect; None for squares.
            """
            super().__init__(**rest)
            self.tower, self.autoencoder, self.native = tower or {}, autoencoder, native
            if tower:
                self.hidden_size, self.num_hidden_layers = tower["width"], tower["depth"]
                self.num_attention_heads, self.intermediate_size = tower["heads"], tower["mlp_dim"]
                self.image_size, self.patch_size = tower["image_size"], tower["patch_size"]

    class OpenVisionTower(_Tower, library.PreTrainedModel):
        """The tower with what transformers asks of a model."""

        config_class = OpenVisionTowerConfig
        main_input_name = "pixel_values"
        base_model_prefix = "openvision"
        supports_gradient_checkpointing = False

        def __init__(self, config: OpenVisionTowerConfig) -> None:
            library.PreTrainedModel.__init__(self, config)
            shape = vision_config(config.tower)
            self.tower = build_vision(shape, None)
            self.with_prefix = config.native is None
            # Stock LLaVA divides image sizes by it.
            self.patch_size = shape.patch_size
            self.autoencoder = _empty_network(shape, config.autoencoder)
            if self.autoencoder is not None:
                self.autoencoder.requires_grad_(False)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Nothing: weights come from a file, or from the tower that `wrap` is given."""

    library.AutoConfig.register(MODEL_TYPE, OpenVisionTowerConfig)
    library.AutoModel.register(OpenVisionTowerConfig, OpenVisionTower)
    return OpenVisionTowerConfig, OpenVisionTower


def wrap(vision: VisionTransformer, native: JsonObject | None = None) -> Pretrained:
    """A tower of ours as a model of transformers; it shares the weights, and those of the autoencoder.

    `native` as in its configuration: the budget of images that keep their aspect.
    """
    shape, network, settings = vision.config, {}, None
    if isinstance(shape, LatentVisionConfig):
        network, settings = _encoding_half(open_autoencoder(shape.autoencoder).network)
    content = asdict(shape)
    if content.get("autoencoder", {}).get("source") is not None:
        # Not the path of this machine: it is inside now.
        content["autoencoder"]["source"] = _INSIDE
    config, kind = register()
    with torch.device("meta"):
        model = kind(config(content, settings, native))
    state = {f"tower.{name}": tensor for name, tensor in vision.state_dict().items() if not name.startswith("head.")}
    model.load_state_dict(state | {f"autoencoder.{name}": tensor for name, tensor in network.items()}, assign=True)
    return cast(Pretrained, model.eval())


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
        whole: Any = network.model.config
        return state, {"diffusers": {name: value for name, value in dict(whole).items() if not name.startswith("_")}}
    return {}, None


def _empty_network(shape: VisionConfig, settings: JsonObject | None) -> nn.Module | None:
    """The encoding half of an autoencoder, to be filled; None for a tower on pixels."""
    if not isinstance(shape, LatentVisionConfig):
        return None
    if settings is None:
        return Pixels(shape.autoencoder.factor)
    if "conv" in settings:
        conv = settings["conv"]
        network = ConvAutoencoder(ConvConfig(**{**conv, "widths": tuple(conv["widths"])}))
        del network.decoder
        return network
    model = require("diffusers", extra="reconstruction").AutoencoderKL(**settings["diffusers"])
    del model.decoder, model.post_quant_conv
    return FromDiffusers(model)

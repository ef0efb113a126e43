"""Images out of a generator: its folder and its encoder opened, and images made for texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from openvision.encoding import encode_texts, evaluating
from openvision.errors import OpenVisionError
from openvision.evaluation.suites.results import file_sha256
from openvision.files import JsonObject, read_json
from openvision.frozen.autoencoder import as_uint8
from openvision.generation.generator import Generator, GeneratorConfig
from openvision.models.openvision3 import OpenVision3
from openvision.text.tokenizer import Tokenizer
from openvision.weights.load import load_checkpoint

WEIGHTS, CONFIG = "model.safetensors", "config.json"
STEPS, GUIDANCE = 50, 2.0
_BATCH = 64


@dataclass(frozen=True)
class OpenGenerator:
    """A generator beside the encoder whose tokens it makes."""

    model: Generator
    encoder: OpenVision3
    tokenizer: Tokenizer
    text: str
    """Field of the shards that it was conditioned on."""

    def images(
        self, texts: Sequence[str], steps: int = STEPS, guidance: float = GUIDANCE, seed: int = 0
    ) -> NDArray[np.uint8]:
        """Images uint8 (n, H, W, 3) for n texts."""
        device = next(self.model.parameters()).device
        conditions = torch.from_numpy(encode_texts(self.encoder, self.tokenizer, texts)).to(device)
        side = round(self.model.config.tokens**0.5)
        images: list[Tensor] = []
        random = torch.Generator().manual_seed(seed)
        with evaluating(self.encoder):
            for part in conditions.split(_BATCH):
                tokens = self.model.sample(part, steps, guidance, random)
                images.append(as_uint8(self.encoder.decode_tokens(tokens, (side, side))).cpu())
        return torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy()


def open_generator(folder: Path, device: torch.device, encoder: str | None = None) -> OpenGenerator:
    """The generator in `folder` on `device`; `encoder` names its encoder where it is no longer where it was.

    Raises OpenVisionError for another encoder.
    """
    content = _read_config(folder)
    named = content["encoder"]
    unified, tokenizer, digest = load_encoder(encoder or named["source"])
    if digest != named["sha256"]:
        raise OpenVisionError(
            f"{encoder or named['source']} is not the encoder that {folder} was trained on: its weights differ; give "
            "that one"
        )
    model = _load_generator(folder, GeneratorConfig(**content["generator"])).to(device).eval()
    unified.to(device)
    return OpenGenerator(model, unified, tokenizer, str(content.get("training", {}).get("text", "synthetic")))


def load_encoder(source: str) -> tuple[OpenVision3, Tokenizer, str]:
    """An OpenVision 3 model, its vocabulary and the SHA-256 of its weights; raises OpenVisionError for another."""
    loaded = load_checkpoint(source)
    if loaded.unified is None or loaded.tokenizer is None:
        raise OpenVisionError(
            f"{source} cannot make images: a generator needs the model folder of an OpenVision 3 run, with its decoder"
        )
    return loaded.unified, loaded.tokenizer, file_sha256(Path(loaded.source) / WEIGHTS)


def _read_config(folder: Path) -> JsonObject:
    if not (folder / CONFIG).is_file():
        raise OpenVisionError(f"{folder} has no {CONFIG}: give a folder that `openvision train-generator` wrote")
    content = read_json(folder / CONFIG)
    if not {"generator", "encoder"} <= content.keys():
        raise OpenVisionError(f"{folder / CONFIG} does not describe a generator; train one again")
    return content


def _load_generator(folder: Path, config: GeneratorConfig) -> Generator:
    model = Generator(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise OpenVisionError(
            f"{folder / WEIGHTS} cannot be read: {str(error).splitlines()[0]}; train the generator again"
        ) from error
    return model

"""Train a generator on the tokens of an OpenVision 3 model and keep it in a folder, which generate.py reads.

model.safetensors    the averaged weights, and mean and deviation of the tokens
config.json          its shape, the encoder that it belongs to, and how it was trained
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from openvision.encoding import encode_texts, evaluating
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ShardImages
from openvision.files import atomic_folder
from openvision.generation.generate import CONFIG, WEIGHTS, load_encoder
from openvision.generation.generator import Generator, GeneratorConfig
from openvision.images.decode import BadSampleError
from openvision.images.preprocess import prepare, to_batch
from openvision.models.openvision3 import OpenVision3
from openvision.runtime import autocast, resolve_precision

DROPPED, AVERAGE, CLIP = 0.1, 0.999, 1.0
_BATCH = 64


@dataclass(frozen=True)
class GeneratorTraining:
    """How a generator is trained; the optimizer is RAE's (AdamW 2e-4, betas .9 and .95, no decay, clip 1)."""

    text: str = "synthetic"
    """Field of the shards that conditions: "name" is class-conditional, a caption caption-conditional."""
    steps: int = 5000
    batch_size: int = 64
    learning_rate: float = 2e-4
    """Constant. RAE's is for a transformer six times as wide; a small one trained for minutes takes 1e-3."""
    limit: int = 20_000
    """Images whose tokens are kept in memory."""
    seed: int = 0


def train_generator(
    source: str,
    shards: Path,
    folder: Path,
    training: GeneratorTraining,
    device: torch.device,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train and write `folder`; returns the mean loss of the last 100 steps. Raises OpenVisionError."""
    if folder.exists():
        raise OpenVisionError(f"{folder} exists; choose another place or remove it")
    encoder, tokenizer, digest = load_encoder(source)
    encoder.to(device)
    tokens, texts = _tokens(encoder, shards, training, device)
    conditions = torch.from_numpy(encode_texts(encoder, tokenizer, texts)).to(device)
    torch.manual_seed(training.seed)
    model = Generator(GeneratorConfig(tokens.shape[1], tokens.shape[2], conditions.shape[1])).to(device)
    model.fit(tokens.to(device))
    averaged = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    random, losses = torch.Generator().manual_seed(training.seed), []
    precision = resolve_precision("auto", device)
    for step in range(training.steps):
        rows = torch.randint(len(tokens), (training.batch_size,), generator=random)
        with autocast(device.type, precision):
            loss = model.loss(tokens[rows].to(device), conditions[rows], DROPPED, random)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        with torch.no_grad():
            # A short average at first: the early weights are forgotten.
            kept = min(AVERAGE, (step + 1) / (step + 10))
            for mine, new in zip(averaged.parameters(), model.parameters(), strict=True):
                mine.lerp_(new, 1 - kept)
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise OpenVisionError(f"the generator diverged at step {step + 1}; use a lower learning rate")
        report(step + 1, losses[-1])
    final = float(np.mean(losses[-100:]))
    facts = {"training": {**asdict(training), "images": len(tokens), "loss": final}}
    with atomic_folder(folder) as temporary:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in averaged.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        content = {"generator": asdict(model.config), "encoder": {"source": source, "sha256": digest}, **facts}
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return final


def _tokens(
    encoder: OpenVision3, shards: Path, training: GeneratorTraining, device: torch.device
) -> tuple[Tensor, list[str]]:
    """Tokens float32 (n, N, D) on the CPU of the images that have a text and can be read, and their texts."""
    data = ShardImages(shards)
    images, side = data.images(), encoder.config.vision.image_size
    texts = [" ".join(each) for each in data.texts(training.text)]
    rows = [row for row, text in enumerate(texts) if text][: training.limit]
    if not rows:
        raise OpenVisionError(
            f"{shards}: no sample has a {training.text!r}; name the field of its captions with --text"
        )
    found, kept = [], []
    with evaluating(encoder):
        for start in range(0, len(rows), _BATCH):
            batch = []
            for row in rows[start : start + _BATCH]:
                try:
                    batch.append(prepare(images.load(row), side))
                    kept.append(texts[row])
                except BadSampleError:
                    continue
            if batch:
                found.append(encoder.vision.patch_tokens(to_batch(batch).to(device)).float().cpu())
    if not found:
        raise OpenVisionError(f"{shards}: no image can be read; restore the shards")
    return torch.cat(found), kept

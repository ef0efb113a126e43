"""A step of a small model on a fixed batch, for tests that compare gradients."""

import numpy as np
import torch

from openvision.data.batch import Batch
from openvision.models.openvision2 import AnyModel
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.training.objective import build_objective
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.parallel import DistributedModel
from openvision.training.step import forward_backward

SAMPLES = 8


def recipe_of(kind: str) -> Recipe:
    decoder = {"width": 16, "depth": 2, "mlp_dim": 32, "heads": 2, "vocab_size": 40, "caption_length": 9}
    text = {"width": 24, "depth": 2, "mlp_dim": 32, "heads": 2, "vocab_size": 40, "context_length": 7}
    vision = {"width": 32, "depth": 3, "mlp_dim": 48, "heads": 2, "patch_size": 8, "image_size": 32}
    stage = {"resolution": 32, "samples": SAMPLES, "batch_size": SAMPLES, "base_learning_rate": 0.01}
    data = {"train": "train", "vocab_size": 40}
    v2 = {"kind": "openvision2", "vision": vision, "decoder": decoder, "keep_ratio": 0.5}
    clip = {"embed_dim": 16, "vision": vision, "text": text}
    # Patches of 8 px are 2 x 2 places of pixels rearranged 4 x 4.
    autoencoder = {"kind": "pixels", "channels": 48, "factor": 4, "scale": 1.0}
    branch = {"width": 24, "depth": 2, "mlp_dim": 32, "heads": 2, "pixels_of": 2, "decoded_at_once": 3}
    v3 = {"kind": "openvision3", "embed_dim": 16, "text": text, "decoder": decoder, "reconstruction": branch}
    v3["vision"] = vision | {"autoencoder": autoencoder}
    genlip = {"kind": "genlip", "vision": vision, "decoder": {"width": 16, "vocab_size": 40, "caption_length": 9}}
    model, loss = {
        "openvision": (clip | {"decoder": decoder}, {}),
        "clip": (clip, {"caption": 0, "texts": ["alt"]}),
        "sigmoid": (clip, {"caption": 0, "kind": "sigmoid", "logit_scales": "per_text", "equal_texts": "positives"}),
        "joint": (clip | {"decoder": decoder}, {"captions": "joint", "logit_scales": "per_text"}),
        "openvision2": (v2, {"contrastive": 0, "texts": []}),
        "genlip": (genlip, {"contrastive": 0, "texts": []}),
        "openvision3": (v3, {"texts": ["sentence"], "caption": 1, "reconstruction": {"latents": 0.4}}),
    }[kind]
    return parse_recipe({"name": kind, "model": model, "loss": loss, "data": data, "stages": [stage]}, kind)


def batch_of(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(5, 40, (SAMPLES, length), generator=generator)

    # Captions of very different lengths, one of them empty: micro-batches differ in their number of target tokens.
    lengths = torch.tensor([0, 1, 9, 2, 9, 9, 3, 1])
    return Batch(
        images=torch.randint(0, 256, (SAMPLES, 3, 32, 32), generator=generator).to(torch.uint8),
        alt_ids=ids(7),
        sentence_ids=ids(7),
        labels=ids(9),
        label_mask=torch.arange(9) < lengths[:, None],
        positions=torch.arange(100, 100 + SAMPLES),
        keys=[str(number) for number in range(SAMPLES)],
        rejects=(),
        texts_cut=0,
        captions_missing=0,
    )


def run(
    model: AnyModel,
    recipe: Recipe,
    micro_batches: int,
    randomness: SampleRandomness,
    dtype: torch.dtype = torch.float32,
):
    """Terms of the losses and gradients by name."""
    model.zero_grad()
    distributed = DistributedModel(model)
    objective = build_objective(distributed, recipe.loss, bos_id=1)
    losses = forward_backward(distributed, objective, batch_of(), randomness, dtype, micro_batches)
    return losses.terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def randomness_of(drop_path: float = 0.0) -> SampleRandomness:
    return SampleRandomness(seed=3, positions=np.arange(100, 100 + SAMPLES), drop_path=drop_path)

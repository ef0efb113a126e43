"""One training step, read top to bottom: forward, losses, backward, check, update."""

from collections.abc import Mapping

import torch
from torch import Tensor

from openvision.data.images import normalize
from openvision.data.loader import Batch
from openvision.errors import OpenVisionError
from openvision.models.openvision import OpenVision
from openvision.objectives.caption import caption_loss
from openvision.objectives.contrastive import contrastive_losses
from openvision.training.optimizer import Adam
from openvision.training.recipe import Loss


def compute_losses(model: OpenVision, batch: Batch, recipe: Loss) -> dict[str, Tensor]:
    """All terms of the objective, scalars; `loss` is the weighted total (spec section 5)."""
    ids = {"alt": batch.alt_ids, "sentence": batch.sentence_ids}
    output = model(normalize(batch.images), *(ids[kind] for kind in recipe.texts))
    per_kind = contrastive_losses(output.image_embeds, output.text_embeds, output.scale)
    terms = {f"contrastive_{kind}": term for kind, term in zip(recipe.texts, per_kind, strict=True)}
    terms["contrastive"] = per_kind.mean()
    terms["loss"] = recipe.contrastive * terms["contrastive"]
    if model.decoder is not None:
        terms["caption"] = caption_loss(
            output.caption_states, batch.labels, batch.label_mask, model.decoder.head.weight
        )
        terms["loss"] = terms["loss"] + recipe.caption * terms["caption"]
    return terms


def train_step(
    model: OpenVision,
    optimizer: Adam,
    batch: Batch,
    recipe: Loss,
    learning_rate: float,
    precision: torch.dtype,
) -> dict[str, float]:
    """Update `model` once; returns the loss terms and the temperature the update was computed with.

    Raises OpenVisionError before the update when a loss is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with autocast(batch.images.device.type, precision):
        losses = compute_losses(model, batch, recipe)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    values = {name: loss.item() for name, loss in losses.items()}
    values["temperature"] = model.logit_scale.exp().item()
    check_finite(values)
    optimizer.step()
    return values


def autocast(device: str, precision: torch.dtype) -> torch.autocast:
    """Autocast to `precision`; float32 switches it off."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision != torch.float32)


def check_finite(values: Mapping[str, float]) -> None:
    """Refuse a step whose loss is NaN or infinite, naming the terms."""
    broken = [name for name, value in values.items() if not torch.isfinite(torch.tensor(value))]
    if broken:
        raise OpenVisionError(
            f"{', '.join(broken)} is not finite; nothing was updated. Lower the learning rate or look at the batch"
        )


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype; "auto" is bfloat16 where the hardware multiplies it faster than float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32

"""Gradients of a batch that is too large for the memory, exact for losses that couple its samples (gradient caching).

1. Every chunk is embedded without a gradient; only the embeddings are kept.
2. The losses over all embeddings give the gradient of each embedding, and of the temperature.
3. Every chunk is run again, now with a gradient, and goes backward from those of its embeddings and from its captions.

What is random in a chunk depends on its samples alone (draws.py), so the second run is the first one. The result is
that of the whole batch at once, but for the rounding of sums; the price is one more forward pass of the towers.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from openvision.data.loader import Batch
from openvision.runtime import autocast
from openvision.training.losses import Losses, Terms
from openvision.training.objective import Embeds, Objective, total, vision_blocks
from openvision.training.randomness import Draws, stochastic_depth


def accumulate_gradients(
    objective: Objective,
    model: Any,
    batch: Batch,
    draws: Draws,
    parts: int,
    precision: torch.dtype,
    count: Tensor | None = None,
) -> Losses:
    """Add the gradient of the whole batch to the parameters, a chunk at a time; `parts` must divide the batch.

    `count` is what sums over target tokens are divided by, by default the target tokens of the batch. Returns the
    losses of the whole batch, without a gradient.
    """
    device = batch.images.device.type
    count = batch.label_mask.sum() if count is None else count
    chunks = list(split(batch, draws, parts))
    embeds = _embed(objective, model, chunks, precision)
    with autocast(device, precision):
        terms = objective.coupled(model, embeds)
    gradients = _gradients(objective, embeds, terms, parts)
    separate: Terms = {}
    for (chunk, chunk_draws), gradient in zip(chunks, gradients, strict=True):
        with stochastic_depth(vision_blocks(model), chunk_draws):
            with autocast(device, precision):
                chunk_embeds, chunk_terms = objective.forward(model, chunk, chunk_draws, count)
            separate = {name: separate.get(name, 0) + term.detach() for name, term in chunk_terms.items()}
            weighed = [objective.weights[name] * term for name, term in chunk_terms.items()]
            torch.autograd.backward([*chunk_embeds, *weighed], [*gradient, *(None for _ in weighed)])
    return total(objective, {name: term.detach() for name, term in (terms | separate).items()})


def split(batch: Batch, draws: Draws, parts: int) -> Iterator[tuple[Batch, Draws]]:
    """The batch in `parts` chunks of equal size."""
    size = len(batch.images) // parts
    for start in range(0, size * parts, size):
        rows = slice(start, start + size)
        tensors = {name: value[rows] for name, value in _tensors(batch).items()}
        yield replace(batch, **tensors, keys=batch.keys[rows]), draws.part(rows)


def _embed(objective: Objective, model: Any, chunks: list[tuple[Batch, Draws]], precision: torch.dtype) -> Embeds:
    """Embeddings of all chunks as leaves that will receive a gradient."""
    embedded: list[Embeds] = []
    with torch.no_grad():
        for chunk, draws in chunks:
            # A context a chunk: autocast keeps the weights it has cast, here those without a gradient.
            with stochastic_depth(vision_blocks(model), draws), autocast(chunk.images.device.type, precision):
                embedded.append(objective.embed(model, chunk))
    return tuple(torch.cat(parts, dim=-2).requires_grad_() for parts in zip(*embedded, strict=True))


def _gradients(objective: Objective, embeds: Embeds, terms: Terms, parts: int) -> list[tuple[Tensor, ...]]:
    """Gradient of each chunk's embeddings; that of the temperature is added to its parameter."""
    weighed = [weight * terms[name] for name, weight in objective.weights.items() if name in terms]
    if not weighed:
        return [() for _ in range(parts)]
    torch.autograd.backward(weighed)
    split_gradients = (embed.grad.chunk(parts, dim=-2) for embed in embeds if embed.grad is not None)
    return list(zip(*split_gradients, strict=True))


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}

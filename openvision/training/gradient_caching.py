"""Gradient caching: a batch that does not fit into memory, in micro-batches, with the exact gradient of the batch.

It is exact for losses that couple the samples of a batch, which plain gradient accumulation is not:

1. Every micro-batch is embedded without a gradient; only the embeddings are kept.
2. The losses over all embeddings give the gradient of each embedding, and of the logit scale.
3. Every micro-batch runs forward once more, now with a gradient, and backward from the gradients of its embeddings and
   from its captions.

The randomness of a micro-batch depends on its samples alone (randomness.py), so the second forward pass repeats the
first. The result is that of the batch at once, but for the rounding of sums; the price is one more forward pass.
"""

from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from openvision.data.loader import Batch
from openvision.runtime import autocast
from openvision.training.objective import Embeds, Losses, Objective, Terms, weighted_losses
from openvision.training.randomness import SampleRandomness, stochastic_depth

MicroBatch = tuple[Batch, SampleRandomness]


def cached_backward(
    objective: Objective,
    batch: Batch,
    randomness: SampleRandomness,
    micro_batches: int,
    precision: torch.dtype,
    target_tokens: Tensor,
) -> Losses:
    """Add the gradient of the batch to the parameters, computed in `micro_batches`, a divisor of the batch size.

    Sums over target tokens are divided by `target_tokens`. Returns the losses of the whole batch, without a gradient.
    """
    device = batch.images.device.type
    micro = list(split(batch, randomness, micro_batches))
    embeds = _embed(objective, micro, precision)
    with autocast(device, precision):
        terms = objective.coupled(embeds, batch)
    gradients = _embedding_gradients(objective, embeds, terms, micro_batches)
    separate: Terms = {}
    for (rows, drawn), gradient in zip(micro, gradients, strict=True):
        with stochastic_depth(objective.vision_blocks, drawn):
            with autocast(device, precision):
                own_embeds, own_terms = objective.forward(rows, drawn, target_tokens)
            separate = {name: separate.get(name, 0) + term.detach() for name, term in own_terms.items()}
            weighted = [weight * own_terms[name] for name, weight in objective.weights.items() if name in own_terms]
            torch.autograd.backward([*own_embeds, *weighted], [*gradient, *(None for _ in weighted)])
    return weighted_losses(objective.weights, {name: term.detach() for name, term in (terms | separate).items()})


def split(batch: Batch, randomness: SampleRandomness, micro_batches: int) -> Iterator[MicroBatch]:
    """The batch in micro-batches of equal size."""
    size = len(batch.images) // micro_batches
    for start in range(0, size * micro_batches, size):
        rows = slice(start, start + size)
        tensors = {name: value[rows] for name, value in _tensors(batch).items()}
        yield replace(batch, **tensors, keys=batch.keys[rows]), randomness.rows(rows)


def _embed(objective: Objective, micro: list[MicroBatch], precision: torch.dtype) -> Embeds:
    """Embeddings of all micro-batches as leaves that will receive a gradient."""
    embedded: list[Embeds] = []
    with torch.no_grad():
        for batch, randomness in micro:
            # A context each: autocast keeps the weights it has cast, here those without a gradient.
            with (
                stochastic_depth(objective.vision_blocks, randomness),
                autocast(batch.images.device.type, precision),
            ):
                embedded.append(objective.embed(batch))
    return tuple(torch.cat(rows, dim=-2).requires_grad_() for rows in zip(*embedded, strict=True))


def _embedding_gradients(
    objective: Objective, embeds: Embeds, terms: Terms, micro_batches: int
) -> list[tuple[Tensor, ...]]:
    """Gradients of each micro-batch's embeddings; that of the logit scale is added to its parameter."""
    weighted = [weight * terms[name] for name, weight in objective.weights.items() if name in terms]
    if not weighted:
        return [() for _ in range(micro_batches)]
    torch.autograd.backward(weighted)
    split_gradients = (embed.grad.chunk(micro_batches, dim=-2) for embed in embeds if embed.grad is not None)
    return list(zip(*split_gradients, strict=True))


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}

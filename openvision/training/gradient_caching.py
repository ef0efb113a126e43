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

from openvision.data.batch import Batch
from openvision.images.native import rows_by_shape, unpack
from openvision.runtime import autocast, send
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

    Images of several shapes must be sorted (`sort_by_shape`): as each micro-batch has one shape, there may be more.

    Sums over target tokens are divided by `target_tokens`. Returns the losses of the whole batch, without a gradient.
    """
    device = batch.images.device.type
    micro = list(split(batch, randomness, micro_batches))
    embeds = _embed(objective, micro, precision)
    with autocast(device, precision):
        terms = objective.coupled(embeds, batch)
    gradients = _embedding_gradients(objective, embeds, terms, [len(rows.images) for rows, _ in micro])
    separate: Terms = {}
    for (rows, drawn), gradient in zip(micro, gradients, strict=True):
        with stochastic_depth(objective.vision_blocks, drawn):
            with autocast(device, precision):
                own_embeds, own_terms = objective.forward(rows, drawn, target_tokens)
            separate = {name: separate.get(name, 0) + term.detach() for name, term in own_terms.items()}
            weighted = [weight * own_terms[name] for name, weight in objective.weights.items() if name in own_terms]
            torch.autograd.backward([*own_embeds, *weighted], [*gradient, *(None for _ in weighted)])
    return weighted_losses(objective.weights, {name: term.detach() for name, term in (terms | separate).items()})


def joint_backward(
    objective: Objective, batch: Batch, randomness: SampleRandomness, precision: torch.dtype, target_tokens: Tensor
) -> Losses:
    """Add the gradient of a sorted batch of several shapes, one forward pass a shape and one graph for all of them.

    It saves the second forward pass of `cached_backward` and takes the memory of the whole batch.
    """
    device = batch.images.device.type
    embedded: list[Embeds] = []
    separate: Terms = {}
    for rows, drawn in split(batch, randomness, 1):
        with autocast(device, precision):
            own_embeds, own_terms = objective.forward(rows, drawn, target_tokens)
        embedded.append(own_embeds)
        separate = {name: separate.get(name, 0) + term for name, term in own_terms.items()}
    embeds = tuple(torch.cat(rows, dim=-2) for rows in zip(*embedded, strict=True))
    with autocast(device, precision):
        losses = weighted_losses(objective.weights, objective.coupled(embeds, batch) | separate)
    losses.total.backward()
    return losses


def split(batch: Batch, randomness: SampleRandomness, micro_batches: int) -> Iterator[MicroBatch]:
    """The batch in micro-batches of equal size; those of sorted shapes end where a shape does."""
    samples = len(batch.images)
    size = samples // micro_batches
    if batch.shapes is None:
        for start in range(0, size * micro_batches, size):
            rows = slice(start, start + size)
            yield _take(batch, rows), randomness.rows(rows)
        return
    begin = 0
    for shape, alike in rows_by_shape(_shapes(batch)).items():
        end = begin + len(alike)
        for start in range(begin, end, max(1, size)):
            rows = slice(start, min(start + max(1, size), end))
            taken = _take(batch, rows)
            yield replace(taken, images=unpack(taken.images, shape), shapes=None), randomness.rows(rows)
        begin = end


def sort_by_shape(batch: Batch, randomness: SampleRandomness) -> MicroBatch:
    """The batch with images of a shape side by side; one whose images are all alike has no `shapes` any more."""
    groups = rows_by_shape(_shapes(batch))
    if len(groups) == 1:
        return replace(batch, images=unpack(batch.images, next(iter(groups))), shapes=None), randomness
    order = [row for rows in groups.values() for row in rows]
    sorted_keys = [batch.keys[row] for row in order]
    rows = torch.tensor(order)
    return replace(batch, **_rows(batch, rows), keys=sorted_keys), randomness.rows(rows.numpy())


def _shapes(batch: Batch) -> list[tuple[int, int]]:
    assert batch.shapes is not None
    return [(height, width) for height, width in batch.shapes.tolist()]


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
    objective: Objective, embeds: Embeds, terms: Terms, sizes: list[int]
) -> list[tuple[Tensor, ...]]:
    """Gradients of the embeddings of micro-batches of `sizes`; that of the logit scale is added to its parameter."""
    weighted = [weight * terms[name] for name, weight in objective.weights.items() if name in terms]
    if not weighted:
        return [() for _ in sizes]
    torch.autograd.backward(weighted)
    split_gradients = (embed.grad.split(sizes, dim=-2) for embed in embeds if embed.grad is not None)
    return list(zip(*split_gradients, strict=True))


def _take(batch: Batch, rows: slice) -> Batch:
    return replace(batch, **_rows(batch, rows), keys=batch.keys[rows])


def _rows(batch: Batch, rows: slice | Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """The rows of all fields that are tensors or tuples of them; an index is sent to the batch's device once."""
    there = rows if isinstance(rows, slice) else send(rows, batch.images.device)

    def take(value: Tensor) -> Tensor:
        return value[rows if value.device.type == "cpu" else there]

    found: dict[str, Tensor | tuple[Tensor, ...]] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            found[field.name] = take(value)
        elif isinstance(value, tuple) and value and all(isinstance(one, Tensor) for one in value):
            found[field.name] = tuple(take(one) for one in value)
    return found

"""The caption loss: cross-entropy over the valid target tokens of the whole batch (spec section 5).

- Logits are computed for valid tokens only and a chunk at a time: at 32,000 words they would otherwise be the
  largest tensor of a training step.
- The gradient is made in the forward pass, while a chunk's probabilities are at hand: nothing is kept but the
  gradients themselves, and nothing is computed twice.
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openvision.runtime import send

# Logits held at a time: 2^22 float32 are 16 MiB, which stays near the processor's caches. An accelerator wants larger
# products, and reads and writes the gradient of the head once a chunk: 2^26 are 256 MiB.
CHUNK_LOGITS = 2**22
CHUNK_LOGITS_ON_ACCELERATOR = 2**26
# On an accelerator the number of targets is rounded up to a multiple of this.
PADDED_TARGETS = 1024


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `states @ weight.T` against `labels`, with its gradient."""

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, labels: Tensor, counts: Tensor | None, chunk: int) -> Tensor:
        total = states.new_zeros(())
        grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight)
        for start in range(0, len(states), chunk):
            rows, targets = states[start : start + chunk], labels[start : start + chunk, None]
            log_probabilities = torch.log_softmax(rows @ weight.T, dim=1)
            likelihoods = log_probabilities.gather(1, targets)
            if counts is not None:
                likelihoods = likelihoods * counts[start : start + chunk, None]
            total -= likelihoods.sum()
            # d loss / d logits = probability - 1 at the target, probability elsewhere.
            grad_logits = log_probabilities.exp_()
            grad_logits.scatter_add_(1, targets, grad_logits.new_full(targets.shape, -1.0))
            if counts is not None:
                grad_logits *= counts[start : start + chunk, None]
            torch.mm(grad_logits, weight, out=grad_states[start : start + chunk])
            grad_weight.addmm_(grad_logits.T, rows)
        ctx.save_for_backward(grad_states, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_states, grad_weight = ctx.saved_tensors
        return grad_states * grad_total, grad_weight * grad_total, None, None, None


def caption_loss(
    states: Tensor,
    labels: Tensor,
    mask: Tensor,
    weight: Tensor,
    chunk_logits: int | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of `states @ weight.T` against `labels` where `mask` is set, in float32.

    The specification divides by the valid tokens of the global batch, which a part of it cannot count by itself:
    - accumulation: with `count` the valid tokens of all parts, the SUM of the parts' values is the loss of the whole;
    - several processes, gradients averaged as DDP and FSDP do: with `count = all_sum(mask.sum(), group) / ranks` the
      MEAN over ranks of the values is the loss of the whole, as it is for the contrastive loss, and so is the averaged
      gradient;
    - both: `count = all_sum(valid tokens of all own parts, group) / ranks`.

    Args:
        states: (B, T, D) decoder states.
        labels: (B, T) int64 targets.
        mask: (B, T) bool, True where a target counts. On the CPU beside states on an accelerator: which targets count
            is then known without waiting for it.
        weight: (V, D), the decoder's head.
        chunk_logits: logits computed at a time; None for what suits the device.
        count: what the sum is divided by, shape (), any dtype; None for the valid tokens given here.

    Returns:
        Scalar loss, nats; 0 when no target counts.
    """
    with torch.autocast(states.device.type, enabled=False):
        rows, counts = _target_rows(mask, states.device)
        valid, targets = states.flatten(0, 1)[rows], labels.flatten()[rows]
        if chunk_logits is None:
            chunk_logits = CHUNK_LOGITS if states.device.type == "cpu" else CHUNK_LOGITS_ON_ACCELERATOR
        chunk = max(1, chunk_logits // len(weight))
        total: Tensor = _LinearCrossEntropy.apply(valid, weight, targets, counts, chunk)  # pyright: ignore[reportAssignmentType]
    # The original divides by (count + 1e-8), which in float32 is the count itself unless that is 0.
    if count is None:
        return total / (int(mask.sum()) + 1e-8)
    # A share of a count must divide as the count does, in float64 too.
    return total / count.to(total.dtype).clamp(min=1e-8)


def _target_rows(mask: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Places of the targets in the flattened batch, int64 (N,), and what each counts, float32 (N,); None is 1 each.

    For an accelerator they are padded with places that count 0: N takes few values, which its allocator and compiler
    prefer.
    """
    rows = (
        torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.flatten().nonzero()[:, 0]
    )
    if mask.device == device:
        return rows, None
    padded = torch.zeros(-(-max(len(rows), 1) // PADDED_TARGETS) * PADDED_TARGETS, dtype=torch.int64)
    padded[: len(rows)] = rows
    counts = torch.zeros(len(padded))
    counts[: len(rows)] = 1
    return send(padded, device), send(counts, device)

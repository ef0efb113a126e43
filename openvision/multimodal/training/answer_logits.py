"""Logits where an answer is, nowhere else: the loss ignores all other positions, so they need not be computed.

A conversation is mostly picture and questions. With a vocabulary of 49,152 the output layer is a fifth of a small
language model's work, and logits in float32 are the largest tensors of a step (with 128,256 words and 2,048 tokens
1 GB a sample). Hooks rather than another loss function, so that the model's own forward is called: gradients of several
processes are synchronised there.
"""

from typing import Any

import torch
from torch import Tensor, nn

from openvision.multimodal.data.conversation import IGNORED


def answer_logits_only(model: nn.Module) -> None:
    """Make `model`, a stock LLaVA, compute its training loss from the logits of answers alone; the loss is the same.

    Holds while the model is called with `labels`; its `logits` are then (answer tokens, vocabulary) instead of (B, L,
    vocabulary). Without labels nothing changes.
    """
    _AnswerLogits(model)


class _AnswerLogits:
    """Knows the labels of the call that is under way."""

    def __init__(self, model: Any) -> None:
        self.labels: Tensor | None = None
        model.register_forward_pre_hook(self._see_labels, with_kwargs=True)
        model.lm_head.register_forward_pre_hook(self._keep_answers)
        model.loss_function = self._loss

    def _see_labels(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        # Position t predicts token t + 1.
        self.labels = None if labels is None else nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]

    def _keep_answers(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.labels is None:
            return None
        return (inputs[0][self.labels != IGNORED],)

    def _loss(self, logits: Tensor, num_items_in_batch: Tensor | int | None = None, **_: Any) -> Tensor:
        """Cross-entropy; a mean over this call's answer tokens or a sum over `num_items_in_batch`, as transformers'."""
        assert self.labels is not None
        targets = self.labels[self.labels != IGNORED].to(logits.device)
        self.labels = None
        total = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)

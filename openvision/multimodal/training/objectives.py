"""Training losses of a LLaVA model, each a module in place of the whole model.

They have the model's parts under the model's own names, so parameters, optimizer state and checkpoints are the same
with and without them, and both DDP and FSDP synchronise in their forward.

`AnswerLoss` is next-token prediction of the answers, with logits at answer positions only: a conversation is mostly
image and questions. With a vocabulary of 49,152 the output layer is a fifth of a small language model's FLOPs, and
float32 logits are the largest tensors of a step (with 128,256 words and 2,048 tokens 1 GB a sample).

`WordAlignment` trains the projector before the language model runs at all; it is our own objective, from no paper. A
sample's projected visual tokens are averaged. Their inner products with the language model's word embeddings, plus the
log frequency of each word, are logits over the words of the stage's answers; the target is uniform over the sample's
words. So from the first step of the next stage, visual tokens lie near the embeddings of the words that describe the
image. A step costs the projector and one small matrix product. A second term keeps projected tokens as large as word
embeddings: the first alone grows them without bound, and a block of the language model hardly changes a large token.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.multimodal.data.conversation import IGNORED
from openvision.multimodal.model.huggingface import Llava

# Logit of an image whose tokens all equal one word's embedding, whatever the scale of the embeddings. A higher one
# allows tokens that say little each, which the language model reads less well (docs/experiments.md).
_SHARPNESS = 10.0
_SIZE_WEIGHT = 0.1


class Loss(TypedDict):
    """Output of an objective, in the form that `transformers.Trainer` reads."""

    loss: Tensor
    """float32, a scalar."""


class Objective(nn.Module):
    """A stock LLaVA or LLaVA-NeXT with another forward: inputs of a batch -> its loss."""

    def __init__(self, model: Llava) -> None:
        super().__init__()
        self.model, self.lm_head, self.config = model.model, model.lm_head, model.config
        # Read by accelerate, which shards these layers, and by the Trainer.
        self._no_split_modules = model._no_split_modules
        self.activation_checkpointing_enable = model.activation_checkpointing_enable


class AnswerLoss(Objective):
    """The model's own loss and gradients, from logits of the answer tokens only."""

    def forward(self, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs: object) -> Loss:
        """Cross-entropy of labels int64 (B, L); `inputs` are the model's.

        The mean over the answer tokens of this call, or their sum divided by `num_items_in_batch`.
        """
        # Position t predicts token t + 1.
        targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        is_answer = targets != IGNORED
        logits = self.lm_head(self.model(**inputs)[0][is_answer])
        total = nn.functional.cross_entropy(logits.float(), targets[is_answer], reduction="sum")
        count = len(logits) if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / (count.to(total.device) if isinstance(count, Tensor) else count)}


@dataclass(frozen=True)
class Vocabulary:
    """The words of a stage's answers."""

    ids: Tensor
    """int64 (W,), ascending: token ids."""
    log_share: Tensor
    """float32 (W,): log of a word's share of all words, each counted once a sample."""


def count_words(answers: Iterable[Iterable[int]], special: Iterable[int]) -> Vocabulary:
    """The vocabulary of samples' answer tokens without `special` ones; raises OpenVisionError when it is empty."""
    skipped = set(special)
    counts = Counter(token for answer in answers for token in set(answer) - skipped)
    if not counts:
        raise OpenVisionError("no answer has a word: objective 'words' needs answers to learn from; check the data")
    ids = sorted(counts)
    shares = torch.tensor([counts[token] for token in ids], dtype=torch.float64)
    return Vocabulary(torch.tensor(ids), (shares / shares.sum()).log().float())


class WordAlignment(Objective):
    """The word loss: a mean over samples, in which samples without an image count zero.

    So micro-batches and processes of equal size average to the loss of the whole batch.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: Llava, vocabulary: Vocabulary) -> None:
        super().__init__(model)
        self.vocabulary = vocabulary
        embeddings = self.model.get_input_embeddings().weight
        # Index of a token among the words; the last one stands for every token that is no word.
        self.word_of_token = torch.full((len(embeddings) + 1,), len(vocabulary.ids))
        self.word_of_token[vocabulary.ids] = torch.arange(len(vocabulary.ids))
        self.word_size = float(embeddings.detach()[vocabulary.ids].float().square().mean().sqrt())

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        **_: object,
    ) -> Loss:
        """`input_ids`, `labels`, `attention_mask`: int64 (B, L); images as the model takes them, or a blank one."""
        tokens = self._projected(pixel_values, image_sizes).float()
        size = tokens.square().mean(dim=-1, keepdim=True).sqrt() / self.word_size
        is_image = input_ids == self.config.image_token_id
        with torch.autocast(tokens.device.type, enabled=False):
            # The attention mask hides a blank image, which only keeps processes in step.
            average = _row_average(is_image, attention_mask)
            pooled, size_loss = average @ tokens, average @ (size - 1).square()
            # A sample without an image has no target.
            target = self._targets(labels) * average.sum(dim=-1, keepdim=True)
            return {"loss": (self._cross_entropy(pooled, target) + _SIZE_WEIGHT * size_loss[:, 0]).mean()}

    def _projected(self, pixel_values: Tensor, image_sizes: Tensor | None) -> Tensor:
        """(visual tokens of the batch, D), in the order of their positions in `input_ids`."""
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        output = self.model.get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=self.config.vision_feature_layer,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            return_dict=True,
            **sizes,
        )
        return torch.cat(list(output.pooler_output))

    def _targets(self, labels: Tensor) -> Tensor:
        """(B, W): uniform over the distinct words of a sample's answers; zero without words."""
        word_of_token = self.word_of_token.to(labels.device)
        tokens = torch.where(labels == IGNORED, len(word_of_token) - 1, labels)
        words = torch.zeros(len(labels), len(self.vocabulary.ids) + 1, device=labels.device)
        words = words.scatter(1, word_of_token[tokens], 1.0)[:, :-1]
        return words / words.sum(dim=-1, keepdim=True).clamp(min=1)

    def _cross_entropy(self, pooled: Tensor, target: Tensor) -> Tensor:
        """(B, D) and (B, W) -> (B,)."""
        # Calling the embedding gathers its weights when they are sharded.
        words = self.model.get_input_embeddings()(self.vocabulary.ids.to(pooled.device)).detach().float()
        scale = _SHARPNESS / (words.shape[-1] * self.word_size**2)
        logits = scale * pooled @ words.T + self.vocabulary.log_share.to(pooled.device)
        return -(target * nn.functional.log_softmax(logits, dim=-1)).sum(dim=-1)


def _row_average(is_image: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, n): a matrix that averages the batch's n visual tokens by row; zeros for a sample without an image."""
    rows, _ = is_image.nonzero(as_tuple=True)
    member = torch.zeros(len(is_image), len(rows), device=rows.device)
    member[rows, torch.arange(len(rows), device=rows.device)] = attention_mask[is_image].float()
    return member / member.sum(dim=-1, keepdim=True).clamp(min=1)

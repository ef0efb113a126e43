"""The projector learns the language model's words before the language model is run: an objective of ours, no paper's.

A sample's projected picture tokens are averaged. Their inner products with the language model's own word embeddings
plus the logarithm of how often a word occurs are logits over the words of the stage's answers; the target is even over
the sample's words. So what the language model reads in a picture's place lies, from its first step on, where its words
for the picture lie. The language model is not run: a step costs what the projector and one small product cost.

A second term keeps projected tokens near the size of word embeddings: the loss alone would grow them without end, and
what a block of the language model adds to a large token hardly moves it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.multimodal.data.conversation import IGNORED

# The logit of a picture whose tokens all equal one word, whatever the scale of the language model's embeddings. A
# higher one lets tokens say little each, which the language model reads less well (docs/experiments.md).
_SHARPNESS = 10.0
# Of the size term beside the words.
_SIZE_WEIGHT = 0.1


@dataclass(frozen=True)
class Vocabulary:
    """The words of a stage's answers."""

    ids: Tensor
    """(W,) int64, ascending: their tokens."""
    log_share: Tensor
    """(W,) float32: logarithm of a word's share of all words, each counted once a sample."""


def count_words(answers: Iterable[Iterable[int]], special: Iterable[int]) -> Vocabulary:
    """The vocabulary of samples' answer tokens; `special` tokens are no words. Raises OpenVisionError without any."""
    skipped = set(special)
    counts = Counter(token for answer in answers for token in set(answer) - skipped)
    if not counts:
        raise OpenVisionError("no answer has a word: a stage with objective 'words' has nothing to learn")
    ids = sorted(counts)
    shares = torch.tensor([counts[token] for token in ids], dtype=torch.float64)
    return Vocabulary(torch.tensor(ids), (shares / shares.sum()).log().float())


def align_words(model: Any, vocabulary: Vocabulary) -> None:
    """Make `model`, a stock LLaVA or LLaVA-NeXT, compute the word loss in place of its own when called with labels.

    Its forward takes what it took and returns `{"loss": scalar}`: a mean over samples, of which those without a picture
    count zero. So micro-batches and processes of like size average to what one batch has.
    """
    alignment = _WordAlignment(model, vocabulary)

    # Not a bound method: accelerate would bind it to the model anew.
    def forward(**inputs: Any) -> dict[str, Tensor]:
        return {"loss": alignment.loss(**inputs)}

    model.forward = forward
    model.accepts_loss_kwargs = False


class _WordAlignment:
    def __init__(self, model: Any, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary
        embeddings = model.get_input_embeddings().weight
        # One place more, at the end, for everything that is no word.
        self.place = torch.full((len(embeddings) + 1,), len(vocabulary.ids))
        self.place[vocabulary.ids] = torch.arange(len(vocabulary.ids))
        self.word_size = float(embeddings.detach()[vocabulary.ids].float().square().mean().sqrt())

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """`input_ids`, `labels`, `attention_mask`: int64 (B, L); pictures as the model takes them, or a blank one."""
        tokens = self._projected(pixel_values, image_sizes).float()
        size = tokens.square().mean(dim=-1, keepdim=True).sqrt() / self.word_size
        is_image = input_ids == self.model.config.image_token_id
        with torch.autocast(tokens.device.type, enabled=False):
            # A blank picture that is there for the sake of other processes lies behind the mask.
            average = _row_average(is_image, attention_mask)
            pooled, size_loss = average @ tokens, average @ (size - 1).square()
            # Without a picture there is nothing to say.
            target = self._targets(labels) * average.sum(dim=-1, keepdim=True)
            return (self._cross_entropy(pooled, target) + _SIZE_WEIGHT * size_loss[:, 0]).mean()

    def _projected(self, pixel_values: Tensor, image_sizes: Tensor | None) -> Tensor:
        """(picture tokens of the batch, D), in the order of their places in `input_ids`."""
        config = self.model.config
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        output = self.model.model.get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
            **sizes,
        )
        return torch.cat(list(output.pooler_output))

    def _targets(self, labels: Tensor) -> Tensor:
        """(B, W): even over the distinct words of a sample's answers; zero where there is none."""
        place = self.place.to(labels.device)
        found = torch.where(labels == IGNORED, len(place) - 1, labels)
        words = torch.zeros(len(labels), len(self.vocabulary.ids) + 1, device=labels.device)
        words = words.scatter(1, place[found], 1.0)[:, :-1]
        return words / words.sum(dim=-1, keepdim=True).clamp(min=1)

    def _cross_entropy(self, pooled: Tensor, target: Tensor) -> Tensor:
        """(B, D) and (B, W) -> (B,)."""
        # Looked up by the module, which gathers its table where that is sharded.
        words = self.model.get_input_embeddings()(self.vocabulary.ids.to(pooled.device)).detach().float()
        scale = _SHARPNESS / (words.shape[-1] * self.word_size**2)
        logits = scale * pooled @ words.T + self.vocabulary.log_share.to(pooled.device)
        return -(target * nn.functional.log_softmax(logits, dim=-1)).sum(dim=-1)


def _row_average(is_image: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, n): what averages the n picture tokens of a batch by row; a row of zeros where a sample has none."""
    rows, _ = is_image.nonzero(as_tuple=True)
    member = torch.zeros(len(is_image), len(rows), device=rows.device)
    member[rows, torch.arange(len(rows), device=rows.device)] = attention_mask[is_image].float()
    return member / member.sum(dim=-1, keepdim=True).clamp(min=1)

"""Examples for people to look at, drawn by lot with a fixed seed, never chosen by success.

The one exception says so: `confident_mistakes` are chosen because they are wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from openvision.data.shards.dataset import ShardDataset
from openvision.encoding import class_embeddings, encode_images, generate_captions, text_encoder
from openvision.evaluation.data.split import Split, read_split
from openvision.evaluation.evaluators.zero_shot import candidates_of
from openvision.evaluation.metrics.patches import as_colours, dense_patch_tokens, principal_components
from openvision.evaluation.metrics.ranks import similarity
from openvision.images.decode import decode_image
from openvision.models.openvision import OpenVision
from openvision.text.tokenizer import Tokenizer

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """A picture to show: RGB uint8 (H, W, 3) as stored in the shard, and its name."""

    pixels: Pixels
    name: str


@dataclass(frozen=True)
class Found:
    """An answer to a query."""

    picture: Picture
    score: float
    right: bool
    place: int
    """From 1."""


@dataclass(frozen=True)
class Retrieved:
    """A text, the pictures nearest to it, and the right one when it is not among them."""

    query: str
    found: list[Found]
    missed: Found | None


@dataclass(frozen=True)
class Neighbours:
    """A held-out picture and the training pictures nearest to it."""

    picture: Picture
    nearest: list[Found]


@dataclass(frozen=True)
class Captioned:
    """A held-out picture, the model's guess of its name, its caption given that guess, and the true caption."""

    picture: Picture
    guess: str
    generated: str
    true: str


@dataclass(frozen=True)
class Mistake:
    """A held-out picture named wrongly, and how sure the model was."""

    picture: Picture
    guess: Picture
    probability: float


@dataclass(frozen=True)
class PatchMap:
    """A picture and its patch tokens' first three principal components as RGB."""

    picture: Picture
    colours: Pixels


class Study:
    """One model on one held-out set, beside the training set: features computed once, examples made on demand."""

    def __init__(self, model: OpenVision, tokenizer: Tokenizer, train: ShardDataset, held_out: ShardDataset) -> None:
        resolution = model.config.vision.image_size
        self.model, self.tokenizer = model, tokenizer
        self.train, self.held_out = train, held_out
        self.split = read_split(held_out, resolution)
        self.train_split = read_split(train, resolution)
        self.images = encode_images(model, self.split.images)
        self.train_images = encode_images(model, self.train_split.images)
        self.candidates, self.targets = candidates_of(self.split.names)
        self.classes = class_embeddings(text_encoder(model, tokenizer), self.candidates)

    def retrieved(self, count: int, seed: int, top: int = 5) -> list[Retrieved]:
        """Held-out pictures nearest to held-out names."""
        scores = similarity(self.classes[self.targets], self.images)
        return [self._retrieve(query, scores[query], top) for query in self.lot(count, seed)]

    def _retrieve(self, query: int, scores: NDArray[np.floating], top: int) -> Retrieved:
        order = np.argsort(-scores, kind="stable")
        places = {int(index): place for place, index in enumerate(order, start=1)}

        def found(index: int) -> Found:
            return Found(self.picture(index), float(scores[index]), index == query, places[index])

        answers = [found(int(index)) for index in order[:top]]
        missed = None if any(answer.right for answer in answers) else found(query)
        return Retrieved(self.split.names[query], answers, missed)

    def neighbours(self, count: int, seed: int, top: int = 5) -> list[Neighbours]:
        """Training pictures nearest to held-out pictures."""
        result = []
        for query in self.lot(count, seed):
            scores = similarity(self.images[query : query + 1], self.train_images)[0]
            order = np.argsort(-scores, kind="stable")[:top]
            nearest = [
                Found(self.train_picture(int(index)), float(scores[index]), False, place)
                for place, index in enumerate(order, start=1)
            ]
            result.append(Neighbours(self.picture(query), nearest))
        return result

    def captioned(self, count: int, seed: int) -> list[Captioned]:
        """Captions generated for held-out pictures from the model's own guess; none without a decoder."""
        if self.model.decoder is None:
            return []
        rows = self.lot(count, seed)
        guesses = [self.candidates[i] for i in similarity(self.images[rows], self.classes).argmax(axis=1)]
        captions = generate_captions(self.model, self.tokenizer, self.split.images[rows], guesses)
        return [
            Captioned(self.picture(row), guess, caption, self.split.captions[row])
            for row, guess, caption in zip(rows, guesses, captions, strict=True)
        ]

    def confident_mistakes(self, count: int) -> list[Mistake]:
        """The wrong names given with the highest probability, most confident first."""
        logits = float(self.model.logit_scale.detach().exp()) * similarity(self.images, self.classes).astype(float)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        guesses = shares.argmax(axis=1)
        wrong = np.flatnonzero(guesses != self.targets)
        order = wrong[np.argsort(-shares[wrong, guesses[wrong]], kind="stable")][:count]
        bearer = {name: row for row, name in reversed(list(enumerate(self.split.names)))}
        return [
            Mistake(
                self.picture(int(row)),
                self.picture(bearer[self.candidates[guesses[row]]]),
                float(shares[row, guesses[row]]),
            )
            for row in order
        ]

    def patch_maps(self, count: int, seed: int, fitted_on: int = 48) -> list[PatchMap]:
        """Maps of `count` pictures; components are fitted on `fitted_on` pictures, the shown ones among them."""
        rows = self.lot(fitted_on, seed)
        patch = self.model.config.vision.patch_size
        factor = next(f for f in (4, 2, 1) if patch % f == 0)
        tokens = dense_patch_tokens(self.model, self.split.images[rows], factor)
        colours = as_colours(principal_components(tokens))
        return [PatchMap(self.picture(row), colours[i]) for i, row in enumerate(rows[:count])]

    def lot(self, count: int, seed: int) -> list[int]:
        """At most `count` held-out rows by lot, the groups taking turns."""
        return draw(self.split.categories or [""] * len(self.split), count, seed)

    def picture(self, row: int) -> Picture:
        """The held-out picture of a row, as stored."""
        return _picture(self.held_out, self.split, row)

    def train_picture(self, row: int) -> Picture:
        """The training picture of a row, as stored."""
        return _picture(self.train, self.train_split, row)


def _picture(dataset: ShardDataset, split: Split, row: int) -> Picture:
    return Picture(decode_image(dataset[split.indices[row]].image), split.names[row])


def draw(groups: Sequence[str], count: int, seed: int) -> list[int]:
    """At most `count` distinct positions, random within a group, the groups taking turns in alphabetical order."""
    rng = np.random.default_rng(seed)
    members: dict[str, list[int]] = {group: [] for group in sorted(set(groups))}
    for index in map(int, rng.permutation(len(groups))):
        members[groups[index]].append(index)
    turns = zip_longest(*members.values())
    return [row for turn in turns for row in turn if row is not None][:count]

"""Example images for the pages: retrieval, neighbours, captions, confusions, confident mistakes, patch tokens.

Examples are drawn by lot with a fixed seed, so every checkpoint shows the same ones; only confusions and mistakes are
chosen, because they are wrong, and say so. Written as gallery.json with the images inside: a page is made from results
alone.
"""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from openvision.data.shards.store import join_folder
from openvision.encoding import evaluating, generate_captions, write_captions
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ImageSet, Labelled, ShardImages, texts_of
from openvision.evaluation.data.options import open_captioned, open_images, open_labelled
from openvision.evaluation.evaluators.base import Evaluator, TrainedEvaluator
from openvision.evaluation.evaluators.baselines import Baselines
from openvision.evaluation.evaluators.caption_loss import CaptionLoss
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.evaluators.probes import Knn
from openvision.evaluation.evaluators.reconstruction import Reconstruction, require_openvision3
from openvision.evaluation.evaluators.retrieval import Retrieval
from openvision.evaluation.evaluators.zero_shot import Answers, ZeroShot
from openvision.evaluation.metrics.patches import (
    as_colours,
    dense_patch_tokens,
    heat_over,
    principal_components,
    text_maps,
)
from openvision.evaluation.metrics.ranks import similarity
from openvision.evaluation.suites.old_results import renamed
from openvision.files import atomic_write_text
from openvision.frozen.autoencoder import as_uint8
from openvision.images.decode import decode_image
from openvision.images.preprocess import prepare, resize, to_batch
from openvision.models.protocols import writes_token_by_token

GALLERY = "gallery.json"
SEED = 0
THUMBNAIL = 96
CONFUSED, MISTAKES, QUERIES, FOUND, NEIGHBOURS, CAPTIONS, MAPS, FITTED = 6, 8, 8, 5, 6, 8, 12, 48
RECONSTRUCTED = 12
# Training images that are encoded for nothing but the examples.
BANK = 4000
# A drawing is smaller as PNG, a photograph as JPEG.
_PNG_BYTES = 12_000

Pixels = NDArray[np.uint8]


class Found(TypedDict):
    """An answer: the name of its image in the album."""

    image: str
    name: str
    right: bool


class Query(TypedDict):
    """A text, the images nearest to it, and the right one with its place from 1."""

    text: str
    place: int
    found: list[Found]
    right: str


class Mistake(TypedDict):
    """An image with a wrong answer, the model's confidence, and an image of the class that was answered."""

    true: str
    answer: str
    confidence: float
    image: str
    bearer: str | None


class Confusion(TypedDict):
    """Images of one class that were given another."""

    true: str
    answer: str
    count: int
    images: list[str]
    bearer: str | None


class Neighbours(TypedDict):
    """An image and the training images whose embeddings are nearest."""

    image: str
    name: str
    nearest: list[Found]


class Caption(TypedDict):
    """An image with the caption that the model writes, given its own guess of the name, and the true one."""

    image: str
    name: str
    guess: str
    generated: str
    true: str


class Map(TypedDict):
    """An image and a map of its patch tokens."""

    text: str
    image: str
    map: str


class Shown(TypedDict, total=False):
    """What an evaluator shows."""

    confusions: list[Confusion]
    mistakes: list[Mistake]
    queries: list[Query]
    maps: list[Map]
    neighbours: list[Neighbours]
    captions: list[Caption]
    reconstructions: list[Map]
    ceilings: list[Map]


class Gallery(TypedDict):
    """gallery.json."""

    evaluators: dict[str, Shown]
    patches: list[Map]
    images: dict[str, str]
    """Name in the album -> data URI."""


def read_gallery(folder: Path) -> Gallery:
    """The gallery of a folder of results; an empty one without."""
    path = folder / GALLERY
    content = renamed(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    return {
        "evaluators": content.get("evaluators", {}),
        "patches": content.get("patches", []),
        "images": content.get("images", {}),
    }


def write_gallery(folder: Path, evaluators: Sequence[Evaluator], model: EvaluatedModel, root: str | Path) -> None:
    """Write gallery.json into `folder` for the evaluators that have something to show."""
    examples = _Examples(evaluators, model, root)
    shown = {one.title: found for one in evaluators if (found := examples.of(one))}
    content: Gallery = {"evaluators": shown, "patches": examples.patches(), "images": examples.album.images}
    atomic_write_text(folder / GALLERY, json.dumps(content) + "\n")


class Album:
    """Images of a gallery, each kept once."""

    def __init__(self) -> None:
        self.images: dict[str, str] = {}

    def add(self, pixels: Pixels) -> str:
        """Keep RGB pixels (H, W, 3), shrunk to a thumbnail; returns their name in the album."""
        height, width = pixels.shape[:2]
        ratio = min(THUMBNAIL / max(height, width), 1)
        small = pixels if ratio == 1 else resize(pixels, max(round(height * ratio), 1), max(round(width * ratio), 1))
        name = hashlib.sha256(small.tobytes() + str(small.shape).encode()).hexdigest()[:16]
        if name not in self.images:
            self.images[name] = data_uri(small)
        return name


def data_uri(pixels: Pixels) -> str:
    """RGB pixels (H, W, 3) as a data URI: PNG, or JPEG where that is much smaller."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    kind, buffer = "png", io.BytesIO()
    image.save(buffer, "PNG")
    if buffer.tell() > _PNG_BYTES:
        kind, buffer = "jpeg", io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def pixels_of(uri: str) -> Pixels:
    """RGB pixels (H, W, 3) of a data URI."""
    return decode_image(base64.b64decode(uri.partition(",")[2]))


def draw(groups: Sequence[str], count: int, seed: int) -> list[int]:
    """At most `count` distinct positions, random within a group, the groups taking turns in alphabetical order."""
    rng = np.random.default_rng(seed)
    members: dict[str, list[int]] = {group: [] for group in sorted(set(groups))}
    for index in map(int, rng.permutation(len(groups))):
        members[groups[index]].append(index)
    turns = zip_longest(*members.values())
    return [row for turn in turns for row in turn if row is not None][:count]


class _Examples:
    """Examples of one model on the data of several evaluators."""

    def __init__(self, evaluators: Sequence[Evaluator], model: EvaluatedModel, root: str | Path) -> None:
        self.evaluators, self.model, self.root = evaluators, model, root
        self.album = Album()

    def of(self, evaluator: Evaluator) -> Shown:
        """What an evaluator shows; empty for most kinds."""
        if isinstance(evaluator, ZeroShot):
            answers = evaluator.answer(self.model, self.root)
            return {"confusions": self._confusions(answers), "mistakes": self._mistakes(answers)}
        if isinstance(evaluator, Retrieval):
            return self._retrieval(evaluator)
        if isinstance(evaluator, (Knn, Baselines)) and self._shows_neighbours(evaluator):
            return {"neighbours": self._neighbours(evaluator)}
        if isinstance(evaluator, Reconstruction):
            return self._reconstructions(evaluator)
        if isinstance(evaluator, CaptionLoss):
            return {"captions": self._captions(evaluator)}
        return {}

    def _lot(self, images: ImageSet, data: str, count: int, seed: int) -> list[int]:
        """At most `count` images that can be decoded, by lot; groups take turns where an evaluator names them."""
        good = set(self.model.encode(images).rows.tolist())
        groups = [""] * len(images)
        for one in self.evaluators:
            grouped = one.open_groups(self.root) if isinstance(one, ZeroShot) and one.data == data else None
            if grouped is not None and len(grouped) == len(images):
                groups = [grouped.classes[label] for label in grouped.labels]
        return [row for row in draw(groups, len(groups), seed) if row in good][:count]

    def _zero_shot(self, data: str) -> ZeroShot | None:
        """The first zero-shot evaluator of the same data, whose classes name its images."""
        return next((one for one in self.evaluators if isinstance(one, ZeroShot) and one.data == data), None)

    def _names(self, images: ImageSet, data: str, named_by: str | None = None) -> list[str]:
        """Names of images: their classes, as a zero-shot evaluator of `named_by` reads them, or else their keys."""
        one = self._zero_shot(named_by or data)
        if one is None:
            return images.keys
        try:
            named = open_labelled(data, self.root, one)
        except OpenVisionError:
            return images.keys
        same = named.images.identity == images.identity
        return [named.classes[label] for label in named.labels] if same else images.keys

    def _confusions(self, answers: Answers) -> list[Confusion]:
        return [
            {
                "true": answers.data.classes[true],
                "answer": answers.data.classes[answer],
                "count": count,
                "images": [
                    self._add(answers.data.images, int(answers.rows[place]))
                    for place in np.flatnonzero((answers.labels == true) & (answers.predicted == answer))[:3].tolist()
                ],
                "bearer": self._bearer(answers.data, answer),
            }
            for true, answer, count in answers.confusions()[:CONFUSED]
            # A pair confused once is no confusion of two classes; it is among the mistakes.
            if count > 1
        ]

    def _mistakes(self, answers: Answers) -> list[Mistake]:
        wrong = np.flatnonzero(answers.labels != answers.predicted)
        order = wrong[np.argsort(-answers.confidence[wrong], kind="stable")][:MISTAKES]
        return [
            {
                "true": answers.data.classes[answers.labels[place]],
                "answer": answers.data.classes[answers.predicted[place]],
                "confidence": float(answers.confidence[place]),
                "image": self._add(answers.data.images, int(answers.rows[place])),
                "bearer": self._bearer(answers.data, int(answers.predicted[place])),
            }
            for place in order.tolist()
        ]

    def _bearer(self, data: Labelled, label: int) -> str | None:
        """The first image of a class."""
        own = np.flatnonzero(data.labels == label)
        return self._add(data.images, int(own[0])) if len(own) else None

    def _add(self, images: ImageSet, row: int) -> str:
        return self.album.add(images.load(row))

    def _retrieval(self, evaluator: Retrieval) -> Shown:
        data = open_captioned(evaluator.data, self.root, evaluator, evaluator.limit)
        encoded, embeds = self.model.embeds(data.images)
        first = {int(image): index for index, image in reversed(list(enumerate(data.owner)))}
        chosen = [first[image] for image in self._lot(data.images, evaluator.data, QUERIES, SEED)]
        texts = evaluator.encode_texts(self.model, data, self.root)[chosen]
        names = self._names(data.images, evaluator.data)
        queries: list[Query] = []
        for index, scores in zip(chosen, similarity(texts, embeds), strict=True):
            owner = int(data.owner[index])
            order = encoded.rows[np.argsort(-scores, kind="stable")]
            found: list[Found] = [
                {"image": self._add(data.images, row), "name": names[row], "right": row == owner}
                for row in order[:FOUND].tolist()
            ]
            place = int(np.flatnonzero(order == owner)[0]) + 1
            right = self._add(data.images, owner)
            queries.append({"text": data.texts[index], "place": place, "found": found, "right": right})
        owners = [int(data.owner[index]) for index in chosen]
        prepared = self._prepared(data.images, owners)
        maps = text_maps(self.model.contrastive, self._dense(prepared), texts)
        return {
            "queries": queries,
            "maps": [
                {
                    "text": data.texts[index],
                    "image": self.album.add(pixels),
                    "map": self.album.add(heat_over(pixels, own)),
                }
                for index, pixels, own in zip(chosen, prepared.permute(0, 2, 3, 1).numpy(), maps, strict=True)
            ],
        }

    def _shows_neighbours(self, evaluator: TrainedEvaluator) -> bool:
        """The first of several evaluators with the same data and training data."""
        same = [
            one
            for one in self.evaluators
            if isinstance(one, (Knn, Baselines)) and (one.data, one.train) == (evaluator.data, evaluator.train)
        ]
        return same[0] is evaluator and not evaluator.data.startswith("hf:")

    def _neighbours(self, evaluator: TrainedEvaluator) -> list[Neighbours]:
        # The same images as the evaluator measured: their vectors are known.
        images = open_images(evaluator.data, self.root, evaluator.limit)
        limit = getattr(evaluator, "train_limit", None)
        if isinstance(evaluator, Baselines):
            # It measured pixels: no vector is known, and examples do not need the nearest of all.
            limit = min(limit or BANK, BANK)
        train = open_images(evaluator.train, self.root, limit)
        encoded, known = self.model.encode(images), self.model.encode(train)
        vectors, bank = (_unit(one.embeds if one.embeds is not None else one.pooled) for one in (encoded, known))
        names = self._names(images, evaluator.data)
        train_names = self._names(train, evaluator.train, named_by=evaluator.data)
        shown: list[Neighbours] = []
        place = {int(row): number for number, row in enumerate(encoded.rows)}
        for row in self._lot(images, evaluator.data, NEIGHBOURS, SEED + 1):
            scores = similarity(vectors[place[row]][None], bank)[0]
            nearest = known.rows[np.argsort(-scores, kind="stable")[:FOUND]]
            found: list[Found] = [
                {"image": self._add(train, one), "name": train_names[one], "right": False} for one in nearest.tolist()
            ]
            shown.append({"image": self._add(images, row), "name": names[row], "nearest": found})
        return shown

    def _reconstructions(self, evaluator: Reconstruction) -> Shown:
        """Images, what an OpenVision 3 model makes of them, and what its autoencoder alone does."""
        images = open_images(evaluator.data, self.root)
        rows = self._lot(images, evaluator.data, RECONSTRUCTED, SEED + 4)
        prepared, unified = self._prepared(images, rows), require_openvision3(self.model)
        with evaluating(unified) as device:
            sent, autoencoder = prepared.to(device), unified.vision.autoencoder(device)
            made = as_uint8(unified.reconstruct(sent)).cpu()
            ceiling = as_uint8(autoencoder.decode(autoencoder.encode(sent))).cpu()
        true, made, ceiling = (each.permute(0, 2, 3, 1).contiguous().numpy() for each in (prepared, made, ceiling))
        maps: list[list[Map]] = [
            [
                {"text": "", "image": self.album.add(own), "map": self.album.add(decoded)}
                for own, decoded in zip(true, side, strict=True)
            ]
            for side in (made, ceiling)
        ]
        return {"reconstructions": maps[0], "ceilings": maps[1]}

    def _captions(self, evaluator: CaptionLoss) -> list[Caption]:
        """Captions that the model writes; version 1 reads its own zero-shot guess, never the true name."""
        shards = ShardImages(join_folder(self.root, evaluator.data))
        images = shards.images()
        rows = self._lot(images, evaluator.data, CAPTIONS, SEED + 2)
        prepared = self._prepared(images, rows)
        captioning, zero_shot = self.model.captioning, self._zero_shot(evaluator.data)
        guesses = [""] * len(rows)
        if writes_token_by_token(captioning):
            generated = write_captions(captioning, self.model.vocabulary, prepared)
        elif zero_shot is not None:
            answers = zero_shot.answer(self.model, self.root)
            guess = dict(zip(answers.rows.tolist(), answers.predicted.tolist(), strict=True))
            guesses = [answers.data.classes[guess[row]] if row in guess else "" for row in rows]
            generated = generate_captions(self.model.contrastive, self.model.vocabulary, prepared, guesses)
        else:
            return []
        names = self._names(images, evaluator.data)
        true = [" ".join(texts_of(value)) for value in shards.values(evaluator.text)]
        return [
            {
                "image": self._add(images, row),
                "name": names[row],
                "guess": guess,
                "generated": caption,
                "true": true[row],
            }
            for row, guess, caption in zip(rows, guesses, generated, strict=True)
        ]

    def patches(self) -> list[Map]:
        """Principal components of the patch tokens of a few images, fitted on some more."""
        for one in self.evaluators:
            if isinstance(one, (ZeroShot, Retrieval, CaptionLoss)):
                images = self._images_of(one)
                rows = self._lot(images, one.data, FITTED, SEED + 3)
                prepared = self._prepared(images, rows)
                colours = as_colours(principal_components(self._dense(prepared)))[:MAPS]
                names = self._names(images, one.data)
                return [
                    {"text": names[row], "image": self._add(images, row), "map": self.album.add(colour)}
                    for row, colour in zip(rows[:MAPS], colours, strict=True)
                ]
        return []

    def _images_of(self, evaluator: ZeroShot | Retrieval | CaptionLoss) -> ImageSet:
        if isinstance(evaluator, ZeroShot):
            return open_labelled(evaluator.data, self.root, evaluator, evaluator.limit).images
        if isinstance(evaluator, Retrieval):
            return open_captioned(evaluator.data, self.root, evaluator, evaluator.limit).images
        return open_images(evaluator.data, self.root)

    def _dense(self, prepared: torch.Tensor) -> torch.Tensor:
        """Patch tokens on a finer grid: small images have few patches and are quickly encoded, large ones not."""
        patch = self.model.vision.config.patch_size
        factor = next(f for f in (4, 2, 1) if patch % f == 0) if self.model.pixels <= 128 else 1
        return dense_patch_tokens(self.model.vision, prepared, factor, 16)

    def _prepared(self, images: ImageSet, rows: Sequence[int]) -> torch.Tensor:
        """uint8 (n, 3, R, R) of images that can be decoded."""
        # Pictures of a gallery are squares, those of a model of native shapes too.
        mode = "squash" if self.model.preprocessing == "squash" else "crop"
        return to_batch([prepare(images.load(row), self.model.pixels, mode) for row in rows])


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

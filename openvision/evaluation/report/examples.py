"""Pictures for the page of a suite: confusions, confident mistakes, retrieval, patch tokens.

Examples are drawn by lot with a fixed seed, so every checkpoint shows the same ones, but for confusions and mistakes,
which are chosen because they are wrong. Written as gallery.json with the pictures inside, so that a page can be made
from results alone.
"""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from openvision.evaluation.data.images import Captioned, Labelled, Pictures
from openvision.evaluation.data.options import open_captioned, open_labelled
from openvision.evaluation.evaluators.base import Evaluator
from openvision.evaluation.evaluators.model import Subject
from openvision.evaluation.evaluators.retrieval import Retrieval
from openvision.evaluation.evaluators.zero_shot import ZeroShot
from openvision.evaluation.metrics.patches import (
    as_colours,
    dense_patch_tokens,
    heat_over,
    principal_components,
    text_maps,
)
from openvision.evaluation.metrics.ranks import similarity
from openvision.evaluation.suites.results import GALLERY, Result
from openvision.files import atomic_write_text
from openvision.images.decode import BadSampleError
from openvision.images.preprocess import prepare, resize

THUMBNAIL = 96
CONFUSED, MISTAKES, QUERIES, FOUND, MAPS = 6, 8, 6, 5, 8
# A drawing is smaller as PNG, a photograph as JPEG.
_PNG_BYTES = 12_000


class Album:
    """Pictures of a gallery, each kept once."""

    def __init__(self) -> None:
        self.pictures: dict[str, str] = {}

    def add(self, pixels: NDArray[np.uint8]) -> str:
        """Keep RGB pixels (H, W, 3), shrunk to a thumbnail; returns their name in the album."""
        small = _shrunk(pixels)
        name = hashlib.sha256(small.tobytes() + str(small.shape).encode()).hexdigest()[:16]
        if name not in self.pictures:
            self.pictures[name] = _data_uri(small)
        return name


def _shrunk(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    ratio = THUMBNAIL / max(height, width)
    return resize(pixels, max(round(height * ratio), 1), max(round(width * ratio), 1)) if ratio < 1 else pixels


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    kind, buffer = "png", io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > _PNG_BYTES:
        kind, buffer = "jpeg", io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def write_gallery(result: Result, evaluators: Sequence[Evaluator], subject: Subject, root: str | Path) -> None:
    """Write OUT/NAME/gallery.json for the evaluators that have something to show."""
    album = Album()
    shown: dict[str, Any] = {}
    for evaluator in evaluators:
        if isinstance(evaluator, ZeroShot):
            data = open_labelled(evaluator.data, root, evaluator, evaluator.limit)
            shown[evaluator.title] = _classified(result, evaluator.title, data, album)
        elif isinstance(evaluator, Retrieval):
            data = open_captioned(evaluator.data, root, evaluator)
            shown[evaluator.title] = _retrieved(subject, data, album)
    content: dict[str, Any] = {"evaluators": shown, "patches": _patches(evaluators, subject, root, album)}
    atomic_write_text(result.folder / GALLERY, json.dumps({**content, "pictures": album.pictures}) + "\n")


def lot(total: int, count: int, seed: int = 0) -> list[int]:
    """At most `count` of `total` numbers, drawn with a fixed seed."""
    return np.random.default_rng(seed).permutation(total)[:count].tolist()


def _classified(result: Result, name: str, data: Labelled, album: Album) -> dict[str, Any]:
    arrays = {part: result.tensors[f"{name}/arrays/{part}"] for part in ("rows", "label", "predicted", "confidence")}
    rows, label, predicted = arrays["rows"], arrays["label"], arrays["predicted"]
    wrong = np.flatnonzero(label != predicted)
    sure = wrong[np.argsort(-arrays["confidence"][wrong], kind="stable")][:MISTAKES]

    def picture(place: int) -> str:
        return album.add(data.pictures.load(int(rows[place])))

    def bearer(klass: int) -> str | None:
        own = np.flatnonzero(label == klass)
        return picture(int(own[0])) if len(own) else None

    confusions = [
        {
            "true": data.classes[true],
            "answer": data.classes[answer],
            "count": count,
            "pictures": [picture(int(p)) for p in np.flatnonzero((label == true) & (predicted == answer))[:3]],
            "bearer": bearer(answer),
        }
        for true, answer, count in result.measured[name]["details"]["confusions"][:CONFUSED]
        # What happened once is no confusion of two classes, and stands among the mistakes.
        if count > 1
    ]
    mistakes = [
        {
            "true": data.classes[label[place]],
            "answer": data.classes[predicted[place]],
            "confidence": float(arrays["confidence"][place]),
            "picture": picture(int(place)),
            "bearer": bearer(int(predicted[place])),
        }
        for place in sure
    ]
    return {"confusions": confusions, "mistakes": mistakes}


def _retrieved(subject: Subject, data: Captioned, album: Album) -> dict[str, Any]:
    encoded, images = subject.embeds(data.pictures)
    usable = np.flatnonzero(np.isin(data.owner, encoded.rows))
    chosen = [int(usable[place]) for place in lot(len(usable), QUERIES)]
    texts = subject.texts([data.texts[index] for index in chosen])
    scores = similarity(texts, images)
    shown = []
    for index, row in zip(chosen, scores, strict=True):
        order = np.argsort(-row, kind="stable")
        own = int(np.flatnonzero(encoded.rows == data.owner[index])[0])
        place = int(np.flatnonzero(order == own)[0])
        found = [_found(data, encoded.rows, int(answer), own, album) for answer in order[:FOUND]]
        shown.append(
            {
                "text": data.texts[index],
                "place": place + 1,
                "found": found,
                "right": album.add(data.pictures.load(int(data.owner[index]))),
            }
        )
    return {"queries": shown, "maps": _text_maps(subject, data, chosen, texts, album)}


def _found(data: Captioned, rows: NDArray[np.int64], answer: int, own: int, album: Album) -> dict[str, Any]:
    picture = album.add(data.pictures.load(int(rows[answer])))
    return {"picture": picture, "key": data.pictures.keys[int(rows[answer])], "right": answer == own}


def _text_maps(
    subject: Subject, data: Captioned, chosen: Sequence[int], texts: NDArray[np.float32], album: Album
) -> list[dict[str, str]]:
    """Where in its picture each text is found."""
    assert subject.model is not None
    owners = [int(data.owner[index]) for index in chosen]
    prepared = _prepared(subject, data.pictures, owners)
    maps = text_maps(subject.model, dense_patch_tokens(subject.vision, prepared, _factor(subject), 16), texts)
    shown = []
    for index, pixels, values in zip(chosen, prepared.permute(0, 2, 3, 1).numpy(), maps, strict=True):
        shown.append(
            {"text": data.texts[index], "picture": album.add(pixels), "map": album.add(heat_over(pixels, values))}
        )
    return shown


def _patches(evaluators: Sequence[Evaluator], subject: Subject, root: str | Path, album: Album) -> list[dict[str, str]]:
    """Principal components of the patch tokens of a few pictures, fitted on some more."""
    pictures = _any_pictures(evaluators, root)
    if pictures is None:
        return []
    rows = lot(len(pictures), 3 * MAPS, seed=1)
    prepared = _prepared(subject, pictures, rows)
    colours = as_colours(principal_components(dense_patch_tokens(subject.vision, prepared, _factor(subject), 16)))
    shown = []
    for pixels, colour in list(zip(prepared.permute(0, 2, 3, 1).numpy(), colours, strict=True))[:MAPS]:
        shown.append({"picture": album.add(pixels), "map": album.add(colour)})
    return shown


def _any_pictures(evaluators: Sequence[Evaluator], root: str | Path) -> Pictures | None:
    for evaluator in evaluators:
        if isinstance(evaluator, ZeroShot):
            return open_labelled(evaluator.data, root, evaluator, evaluator.limit).pictures
        if isinstance(evaluator, Retrieval):
            return open_captioned(evaluator.data, root, evaluator).pictures
    return None


def _factor(subject: Subject) -> int:
    """How much finer than patches: small pictures have few patches and are quickly encoded, large ones the reverse."""
    patch = subject.vision.config.patch_size
    return next(f for f in (4, 2, 1) if patch % f == 0) if subject.pixels <= 128 else 1


def _prepared(subject: Subject, pictures: Pictures, rows: Sequence[int]) -> torch.Tensor:
    """uint8 (n, 3, R, R); a picture that cannot be decoded is grey."""
    made = []
    for row in rows:
        try:
            made.append(prepare(pictures.load(row), subject.pixels, subject.preprocessing))
        except BadSampleError:
            made.append(np.full((subject.pixels, subject.pixels, 3), 128, dtype=np.uint8))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()

"""The model under evaluation with its preprocessing: encodes images and texts once and remembers the vectors.

Images are decoded by threads while the model computes on the batch before (`prepared_batches`), exactly and in full: no
JPEG is decoded at a smaller scale. Every process encodes its own rows; the vectors are gathered.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from openvision.encoding import batch_memory, check_features, encode_texts, evaluating, once
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ImageSet
from openvision.images.decode import BadSampleError
from openvision.images.native import prepare_as, rows_by_shape
from openvision.images.preprocess import Preprocessing, resize
from openvision.models.layers import unit
from openvision.models.openvision3 import build_vision
from openvision.models.protocols import ContrastiveModel, Model
from openvision.models.vision import VisionTransformer
from openvision.runtime import HostCopy, Processes, send
from openvision.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
Features = NDArray[np.float32]

# Share of images that may be undecodable before a result would say more about the files than about the model.
REJECT_BUDGET = 0.01
THUMBNAIL = 16
CELLS = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """Vectors of the images that could be decoded."""

    rows: NDArray[np.int64]
    """Their numbers in the set, ascending."""
    embeds: Features | None
    """(r, E) unit vectors; None for a tower without a head."""
    pooled: Features
    """(r, D), the normalised mean patch token: what probes read."""
    rejected: int
    """Images left out."""
    cells: Features | None = None
    """(r, 16 * D), patch tokens averaged in 4 x 4 cells of the image; None where nobody asked for them."""


@dataclass
class EvaluatedModel:
    """A model with how its images are prepared; every process gets the same vectors."""

    vision: VisionTransformer
    model: Model | None = None
    """The whole model; None for a vision tower alone."""
    tokenizer: Tokenizer | None = None
    resolution: int | None = None
    """Pixels; the tower's own by default."""
    preprocessing: Preprocessing = "crop"
    """With "native" images keep their aspect, and a batch has one shape."""
    batch_size: int = 64
    threads: int = 2
    processes: Processes = field(default_factory=Processes)
    progress: Progress | None = None
    autocast: torch.dtype | None = None
    """Compute dtype on the model's device; None computes as the parameters are."""
    reject_budget: float = REJECT_BUDGET
    """Share of images that may be undecodable."""
    when_out_of_memory: str = ""
    """What to do then; by default to take smaller batches."""
    _encoded: dict[str, Encoded] = field(default_factory=dict, repr=False)
    _texts: dict[tuple[str, ...], Features] = field(default_factory=dict, repr=False)
    _thumbnails: dict[str, tuple[NDArray[np.int64], NDArray[np.uint8]]] = field(default_factory=dict, repr=False)
    _kept: dict[Hashable, object] = field(default_factory=dict, repr=False)
    _elongated: dict[str, str] = field(default_factory=dict, repr=False)
    """Identity of a set -> why one of its images, readable but too long, was left out."""

    @property
    def pixels(self) -> int:
        """Side of the images as the tower sees them."""
        return self.resolution or self.vision.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of such an image."""
        return self.vision.config.grid(self.pixels, self.pixels)

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax: exp(logit_scale)."""
        return HostCopy(self.contrastive.logit_scale.detach().exp()).values()[0]

    @property
    def vocabulary(self) -> Tokenizer:
        """The tokenizer; raises OpenVisionError for a checkpoint without one."""
        if self.tokenizer is None:
            raise OpenVisionError("this checkpoint has no vocabulary; give vocab.txt with --vocabulary")
        return self.tokenizer

    @property
    def has_text(self) -> bool:
        """Whether images can be compared with texts."""
        return self.model is not None and self.model.text is not None

    @property
    def has_decoder(self) -> bool:
        """Whether the model can caption images."""
        return self.model is not None and self.model.decoder is not None

    @property
    def contrastive(self) -> ContrastiveModel:
        """The model with its text tower; raises OpenVisionError without one."""
        if self.model is None or self.model.text is None:
            raise OpenVisionError(
                "this checkpoint has no text tower; measure knn, linear_probe, few_shot, patch_probe, correspondence "
                "or, where it has a decoder, caption_loss on it"
            )
        return cast("ContrastiveModel", self.model)

    @property
    def captioning(self) -> Model:
        """The model with its caption decoder; raises OpenVisionError without one."""
        if self.model is None or self.model.decoder is None:
            raise OpenVisionError("this checkpoint has no caption decoder")
        return self.model

    @property
    def device(self) -> torch.device:
        """Where the model is, and where probes are fitted."""
        return next(self.vision.parameters()).device

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for each key: evaluators that learn from the same images fit one probe."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast("T", self._kept[key])

    def untrained(self) -> "EvaluatedModel":
        """The same vision tower with initial parameters, from a fixed seed: what the architecture alone gives."""

        def make() -> EvaluatedModel:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                fresh = build_vision(self.vision.config, None)
            how = (self.pixels, self.preprocessing, self.batch_size, self.threads, self.processes, self.progress)
            return EvaluatedModel(fresh.to(self.device), None, None, *how, self.autocast, self.reject_budget)

        return self.keep("untrained", make)

    def encode(self, images: ImageSet, cells: bool = False) -> Encoded:
        """Vectors of every image of the set; raises OpenVisionError for NaN or too many bad images.

        `cells` asks for averaged patch tokens too; the other vectors come with them, so ask for them first.
        """
        known = self._encoded.get(images.identity)
        if known is None or (cells and known.cells is None):
            known = self._encoded[images.identity] = self._encode(images, cells)
        return known

    def _encode(self, images: ImageSet, cells: bool) -> Encoded:
        width, head = self.vision.config.width, self.vision.head
        embedded = head.out_features if head is not None else 0

        def vectors_of(batch: Tensor) -> Tensor:
            features = self.vision.forward_features(batch)
            vectors = [features.pooled.float()]
            if head is not None:
                vectors.append(unit(self.vision.project(features.pooled)).float())
            if cells:
                tokens = features.patch_tokens.float().transpose(1, 2).unflatten(2, features.grid)
                vectors.append(F.adaptive_avg_pool2d(tokens, CELLS).flatten(1))
            return torch.cat(vectors, dim=1)

        size = width + embedded + (CELLS**2 * width if cells else 0)
        rows, vectors = self.map_images(images, (size,), vectors_of)
        check_features(vectors, "image features")
        pooled, embeds, rest = (
            np.ascontiguousarray(part) for part in np.split(vectors, (width, width + embedded), axis=1)
        )
        return Encoded(rows, embeds if embedded else None, pooled, len(images) - len(rows), rest if cells else None)

    def map_images(
        self, images: ImageSet, shape: tuple[int, ...], compute: Callable[[Tensor], Tensor]
    ) -> tuple[NDArray[np.int64], Features]:
        """Rows (r,) of the images that can be decoded and what `compute` gives for them, (r, *shape) float32.

        `compute` takes uint8 (b, 3, R, R) on the model's device. Each process computes its own rows.
        """
        mine = self.processes.rows(len(images))
        found = np.zeros((len(mine), *shape), dtype=np.float32)
        good = np.zeros(len(mine), dtype=np.bool_)
        done = 0
        side = self.pixels
        with (
            evaluating(self.vision) as device,
            self.precision(device),
            batch_memory(device, min(self.batch_size, len(mine)), (side, side), self.when_out_of_memory),
        ):
            for places, batch in prepared_batches(images, mine, self, self.batch_size):
                found[places] = compute(send(batch, device)).cpu().numpy()
                good[places] = True
                done += len(batch)
                if self.progress:
                    self.progress(done, len(mine))
        found, good = (self.processes.gather_rows(array, len(images)) for array in (found, good))
        rows = np.flatnonzero(good)
        self.check_rejected(len(images) - len(rows), images)
        return rows, found[rows]

    def check_rejected(self, rejected: int, images: ImageSet) -> None:
        """Raise OpenVisionError when more images were left out than the budget allows."""
        most = max(self.reject_budget * len(images), 1)
        if rejected > most or rejected == len(images):
            if why := self._elongated.get(images.identity):
                raise OpenVisionError(
                    f"{rejected} of {len(images)} images of {images.name} are left out, and the result would be about "
                    f"other images than it says; one of them: {why}"
                )
            raise OpenVisionError(
                f"{rejected} of {len(images)} images of {images.name} cannot be decoded, or their json not "
                "read; restore the files: without them the result would be about other images than it says"
            )

    def note_left_out(self, images: ImageSet, bad: BadSampleError) -> None:
        """Keep why an image is left out where its shape is to blame and not its file."""
        if bad.reason == "extreme_aspect":
            self._elongated.setdefault(images.identity, str(bad))

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which the model computes."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)

    def embeds(self, images: ImageSet) -> tuple[Encoded, Features]:
        """Vectors in the space shared with texts; raises OpenVisionError for a tower without a head."""
        encoded = self.encode(images)
        if encoded.embeds is None:
            raise OpenVisionError("this vision tower has no projection head (captioning alone trains none)")
        return encoded, encoded.embeds

    def texts(self, texts: Sequence[str]) -> Features:
        """Unit vectors (n, E) of texts, each process its slice."""
        distinct, place = once(texts)
        if tuple(distinct) not in self._texts:
            self._texts[tuple(distinct)] = self._encode_texts(distinct)
        return self._texts[tuple(distinct)][place]

    def _encode_texts(self, distinct: list[str]) -> Features:
        model, tokenizer = self.contrastive, self.vocabulary
        mine = [distinct[row] for row in self.processes.rows(len(distinct))]
        vectors = np.zeros((0, model.config.embed_dim), dtype=np.float32)
        with self.precision(next(model.parameters()).device):
            vectors = encode_texts(model, tokenizer, mine, 256) if mine else vectors
        return self.processes.gather_rows(vectors, len(distinct))

    def thumbnails(self, images: ImageSet) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Rows (r,) of the images that can be decoded and those images at 16 x 16 pixels, uint8 (r, 3, 16, 16)."""
        if images.identity not in self._thumbnails:
            rows, small = self.map_images(images, (3, THUMBNAIL, THUMBNAIL), _shrink)
            self._thumbnails[images.identity] = rows, small.astype(np.uint8)
        return self._thumbnails[images.identity]


def _shrink(batch: Tensor) -> Tensor:
    small = [resize(image, THUMBNAIL, THUMBNAIL) for image in batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
    return torch.from_numpy(np.stack(small).transpose(0, 3, 1, 2))


def prepared_batches(
    images: ImageSet, rows: Sequence[int], model: EvaluatedModel, batch_size: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Batches of uint8 (b, 3, R, R), or of one native shape, and the places of their images in `rows`.

    Bad images are left out.

    While the caller works on a batch, threads prepare the next two.
    """

    def load(row: int) -> NDArray[np.uint8] | None:
        try:
            shape = model.vision.config
            return prepare_as(model.preprocessing, images.load(row), model.pixels, shape.patch_size, shape.aspects)
        except BadSampleError as bad:
            model.note_left_out(images, bad)
            return None

    with ThreadPoolExecutor(model.threads) as pool:
        ahead: list[tuple[int, list[Future[NDArray[np.uint8] | None]]]] = []
        for start in range(0, len(rows), batch_size):
            ahead.append((start, [pool.submit(load, row) for row in rows[start : start + batch_size]]))
            if len(ahead) > 2:
                yield from _batch(*ahead.pop(0))
        for waiting in ahead:
            yield from _batch(*waiting)


def _batch(start: int, futures: list[Future[NDArray[np.uint8] | None]]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    loaded = [(start + index, future.result()) for index, future in enumerate(futures)]
    good = [(place, image) for place, image in loaded if image is not None]
    for rows in rows_by_shape([image.shape[:2] for _, image in good]).values():
        images = torch.from_numpy(np.stack([good[row][1] for row in rows])).permute(0, 3, 1, 2).contiguous()
        yield np.array([good[row][0] for row in rows], dtype=np.int64), images

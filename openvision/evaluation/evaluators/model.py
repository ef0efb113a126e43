"""What is measured: a model with its preprocessing, encoding pictures and texts once and remembering the vectors.

Pictures are decoded by threads while the model computes on the batch before (`prepared_batches`), exactly and in full:
no JPEG is decoded at a smaller scale. Every process encodes its own rows; the vectors are gathered.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openvision.encoding import check_features, encode_texts, evaluating, once
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import Pictures
from openvision.images.decode import BadSampleError
from openvision.images.preprocess import Preprocessing, normalize, prepare
from openvision.models.layers import unit
from openvision.models.openvision import OpenVision
from openvision.models.vision import VisionTransformer
from openvision.runtime import Processes
from openvision.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
Features = NDArray[np.float32]

# Share of pictures that may be undecodable before a result would say more about the files than about the model.
REJECT_BUDGET = 0.01


@dataclass(frozen=True)
class Encoded:
    """Vectors of the pictures that could be decoded."""

    rows: NDArray[np.int64]
    """Their numbers in the set, ascending."""
    embeds: Features | None
    """(r, E) unit vectors; None for a tower without a head."""
    pooled: Features
    """(r, D), the normalised mean patch token: what probes read."""
    rejected: int
    """Pictures left out."""


@dataclass
class Subject:
    """A model under evaluation; `encode` and `texts` give the same vectors in every process."""

    vision: VisionTransformer
    model: OpenVision | None = None
    """The whole model; None for a vision tower alone."""
    tokenizer: Tokenizer | None = None
    resolution: int | None = None
    """Pixels; the tower's own by default."""
    preprocessing: Preprocessing = "crop"
    batch_size: int = 64
    threads: int = 2
    processes: Processes = field(default_factory=Processes)
    progress: Progress | None = None
    autocast: torch.dtype | None = None
    """Compute dtype on the model's device; None computes as the parameters are."""
    _encoded: dict[str, Encoded] = field(default_factory=dict, repr=False)

    @property
    def pixels(self) -> int:
        """Side of the pictures as the tower sees them."""
        return self.resolution or self.vision.config.image_size

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax: exp(logit_scale)."""
        return float(self._whole().logit_scale.detach().exp())

    def _whole(self) -> OpenVision:
        if self.model is None:
            raise OpenVisionError(
                "this checkpoint is a vision tower without a text tower; only knn, linear_probe, few_shot and "
                "patch_probe can be measured on it"
            )
        return self.model

    def encode(self, pictures: Pictures) -> Encoded:
        """Vectors of every picture of the set; raises OpenVisionError for NaN or too many bad pictures."""
        if pictures.identity not in self._encoded:
            self._encoded[pictures.identity] = self._encode(pictures)
        return self._encoded[pictures.identity]

    def _encode(self, pictures: Pictures) -> Encoded:
        mine = self.processes.rows(len(pictures))
        width = self.vision.config.width
        head = self.vision.head
        vectors = np.zeros((len(mine), width + (head.out_features if head is not None else 0)), dtype=np.float32)
        good = np.zeros(len(mine), dtype=np.bool_)
        with evaluating(self.vision) as device:
            done = 0
            for places, batch in prepared_batches(pictures, mine, self):
                with self._precision(device):
                    pooled = self.vision.forward_features(normalize(batch.to(device))).pooled
                    parts = [pooled.float()]
                    if head is not None:
                        parts.append(unit(self.vision.project(pooled)).float())
                vectors[places] = torch.cat(parts, dim=1).cpu().numpy()
                good[places] = True
                done += len(batch)
                if self.progress:
                    self.progress(done, len(mine))
        vectors = self.processes.gather_rows(vectors, len(pictures))
        good = self.processes.gather_rows(good, len(pictures))
        rows = np.flatnonzero(good)
        self._check_rejected(len(pictures) - len(rows), pictures)
        check_features(vectors[rows], "image features")
        embeds = np.ascontiguousarray(vectors[rows, width:]) if head is not None else None
        return Encoded(rows, embeds, np.ascontiguousarray(vectors[rows, :width]), len(pictures) - len(rows))

    def _check_rejected(self, rejected: int, pictures: Pictures) -> None:
        if rejected > REJECT_BUDGET * len(pictures) and (rejected > 1 or len(pictures) == 1):
            raise OpenVisionError(
                f"{rejected} of {len(pictures)} pictures of {pictures.name} cannot be decoded; restore the files, or "
                "the result would be about other pictures than it says"
            )

    def _precision(self, device: torch.device) -> Any:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    def embeds(self, pictures: Pictures) -> tuple[Encoded, Features]:
        """Vectors in the space shared with texts; raises OpenVisionError for a tower without a head."""
        encoded = self.encode(pictures)
        if encoded.embeds is None:
            raise OpenVisionError("this vision tower has no projection head (OpenVision 2 trains none)")
        return encoded, encoded.embeds

    def texts(self, texts: Sequence[str]) -> Features:
        """Unit vectors (n, E) of texts, each process its slice."""
        model = self._whole()
        if self.tokenizer is None:
            raise OpenVisionError("this checkpoint came without its vocabulary; give vocab.txt with --vocabulary")
        distinct, place = once(texts)
        mine = [distinct[row] for row in self.processes.rows(len(distinct))]
        with self._precision(next(model.parameters()).device):
            vectors = encode_texts(model, self.tokenizer, mine, 256) if mine else self._none()
        return self.processes.gather_rows(vectors, len(distinct))[place]

    def _none(self) -> Features:
        return np.zeros((0, self._whole().config.embed_dim), dtype=np.float32)

    def forget(self) -> None:
        """Drop remembered vectors, when the weights change."""
        self._encoded.clear()


def prepared_batches(
    pictures: Pictures, rows: Sequence[int], subject: Subject
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Batches of uint8 (b, 3, R, R) and the places of their pictures in `rows`; bad pictures are left out.

    While the caller works on a batch, threads prepare the next two.
    """

    def load(row: int) -> NDArray[np.uint8] | None:
        try:
            return prepare(pictures.load(row), subject.pixels, subject.preprocessing)
        except BadSampleError:
            return None

    with ThreadPoolExecutor(subject.threads) as pool:
        ahead: list[tuple[int, list[Future[NDArray[np.uint8] | None]]]] = []
        for start in range(0, len(rows), subject.batch_size):
            ahead.append((start, [pool.submit(load, row) for row in rows[start : start + subject.batch_size]]))
            if len(ahead) > 2:
                yield from _batch(*ahead.pop(0))
        for waiting in ahead:
            yield from _batch(*waiting)


def _batch(start: int, futures: list[Future[NDArray[np.uint8] | None]]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    loaded = [(start + index, future.result()) for index, future in enumerate(futures)]
    good = [(place, image) for place, image in loaded if image is not None]
    if good:
        images = torch.from_numpy(np.stack([image for _, image in good])).permute(0, 3, 1, 2).contiguous()
        yield np.array([place for place, _ in good], dtype=np.int64), images

"""Search in a folder of vectors: exact by numpy, or approximate by FAISS where `build_approximate` has been called.

Exact search reads every vector. The approximate index has sqrt(n) clusters, and for each a list of its vectors in 8
bits; a query reads the lists nearest to it, and the best candidates are compared again with the exact vectors.

    INDEX/approximate.faiss   the lists
    INDEX/approximate.json    the vectors it was built from, how many lists a query reads, and the recall measured
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError, require
from openvision.files import atomic_write_bytes, atomic_write_text, read_json
from openvision.inference.embed import weights_hash
from openvision.inference.vector_folder import MANIFEST, VectorFolder, open_vector_folder
from openvision.inference.vision import VisionEncoder
from openvision.untrusted import check_count, json_text

LISTS, NOTE = "approximate.faiss", "approximate.json"
RECALL = 0.95
"""Share of the ten nearest vectors that the approximate index finds, at least, on vectors of its own."""
LEAST_VECTORS = 10_000
"""Below, exact search is as fast."""
# A query compares this many candidates for each result again; 8 bits alone confuse near duplicates.
_CANDIDATES = 8
_TRAINING_VECTORS = 64
_QUERIES = 200


@dataclass(frozen=True)
class Hit:
    """An image that was found."""

    name: str
    """Name of the image in its folder, or key in its shards."""
    cosine: float


@dataclass(frozen=True)
class Build:
    """How an approximate index was built."""

    lists: int
    probes: int
    """Lists that a query reads."""
    recall: float
    """Recall at 10 against exact search, of vectors of the index, each without itself."""
    seconds: float


class VectorIndex:
    """Nearest images to a vector."""

    def __init__(self, vectors: VectorFolder, exact: bool = False) -> None:
        """Search `vectors`, through the approximate index beside them if there is one and not `exact`."""
        self.vectors = vectors
        self._approximate = None if exact else _open_approximate(vectors)

    @classmethod
    def open(cls, folder: Path, exact: bool = False) -> "VectorIndex":
        """Open a folder that `openvision encode` wrote."""
        return cls(open_vector_folder(folder), exact)

    @property
    def is_approximate(self) -> bool:
        """Whether results may miss some of the nearest images."""
        return self._approximate is not None

    def check_encoder(self, encoder: VisionEncoder) -> None:
        """Raise OpenVisionError unless the vectors are those of `encoder`: others have no common space."""
        job, side = self.vectors.job, encoder.resolution
        if job.weights != weights_hash(encoder):
            raise OpenVisionError(
                f"{self.vectors.folder} has vectors of another checkpoint, {job.model}; give that checkpoint, or "
                "encode the images again"
            )
        found = ([side, side] if isinstance(side, int) else list(side), encoder.preprocessing)
        if found != (job.resolution, job.preprocessing):
            height, width = job.resolution
            raise OpenVisionError(
                f"{self.vectors.folder} was encoded at {height} x {width} px with preprocessing {job.preprocessing!r}; "
                "load the encoder with the same, or encode the images again"
            )

    def search(self, query: NDArray[np.float32], top: int = 5) -> list[Hit]:
        """The `top` images nearest to a unit vector (E,), nearest first; ties keep the order of the images."""
        numbers, cosines = self.nearest(query, top)
        return [
            Hit(self.vectors.name(int(number)), float(cosine)) for number, cosine in zip(numbers, cosines, strict=True)
        ]

    def nearest(self, query: NDArray[np.float32], top: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Numbers and cosines of the nearest vectors, (k,) each with k at most `top`."""
        if top < 1:
            raise OpenVisionError(f"top must be at least 1, not {top}")
        if query.shape != (self.vectors.width,):
            raise OpenVisionError(
                f"the query has shape {query.shape}, the vectors of {self.vectors.folder} have width "
                f"{self.vectors.width}; encode both with one checkpoint"
            )
        if self._approximate is None:
            return _exact(self.vectors, query, top)
        return _search_lists(self._approximate, self.vectors, query, top)


def _search_lists(
    index: Any, vectors: VectorFolder, query: NDArray[np.float32], top: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    _, found = index.search(query[None].astype(np.float32), top * _CANDIDATES)
    numbers = np.sort(found[0][found[0] >= 0])
    return _best(numbers, vectors.rows(numbers) @ query, top)


def _exact(
    vectors: VectorFolder, query: NDArray[np.float32], top: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    numbers, cosines = np.empty(0, np.int64), np.empty(0, np.float32)
    for start, block in zip(vectors.starts, vectors.blocks(), strict=True):
        here, best = _best(np.arange(start, start + len(block)), block @ query, top)
        numbers, cosines = _best(np.concatenate([numbers, here]), np.concatenate([cosines, best]), top)
    return numbers, cosines


def _best(
    numbers: NDArray[np.int64], cosines: NDArray[np.float32], top: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The `top` largest, largest first; of equal ones the first."""
    if len(cosines) > 8 * top:
        # Everything that is at least the smallest one wanted, so that ties are broken below.
        keep = np.flatnonzero(cosines >= np.partition(cosines, -top)[-top])
        numbers, cosines = numbers[keep], cosines[keep]
    order = np.argsort(-cosines, kind="stable")[:top]
    return numbers[order], cosines[order]


def build_approximate(
    folder: Path, recall: float = RECALL, seed: int = 0, say: Callable[[str], None] = lambda _: None
) -> Build:
    """Write the approximate index of a folder of vectors; needs the extra `search`.

    A query reads as few lists as reach `recall` at 10, measured on a sample of the vectors. Texts are farther from
    images than images are from each other: their recall may be lower, and `exact` finds everything.
    """
    if not 0 < recall <= 1:
        raise OpenVisionError(f"recall is {recall}; it must be above 0 and at most 1")
    faiss: Any = require("faiss", extra="search")
    vectors, start = open_vector_folder(folder), time.perf_counter()
    if vectors.total < LEAST_VECTORS:
        raise OpenVisionError(
            f"{folder} has {vectors.total} vectors; below {LEAST_VECTORS} exact search is as fast, so it needs no index"
        )
    lists, random = round(vectors.total**0.5), np.random.default_rng(seed)
    say(f"clustering {vectors.total} vectors into {lists} lists")
    coarse = faiss.IndexFlatIP(vectors.width)
    index = faiss.IndexIVFScalarQuantizer(
        coarse, vectors.width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.seed, index.cp.spherical = seed, True
    sample = min(vectors.total, _TRAINING_VECTORS * lists)
    index.train(vectors.rows(np.sort(random.choice(vectors.total, sample, replace=False))))
    for number, block in enumerate(vectors.blocks()):
        index.add(np.ascontiguousarray(block))
        say(f"shard {number + 1} of {len(vectors.counts)} added")
    queries = np.sort(random.choice(vectors.total, _QUERIES, replace=False))
    probes, reached = _choose_probes(index, vectors, queries, recall)
    atomic_write_bytes(folder / LISTS, faiss.serialize_index(index).tobytes())
    built = Build(lists, probes, reached, time.perf_counter() - start)
    content = {"vectors": _fingerprint(vectors), **built.__dict__}
    atomic_write_text(folder / NOTE, json_text(content, indent=2) + "\n")
    return built


def exact_neighbours(vectors: VectorFolder, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Numbers of the k vectors nearest to each of the unit vectors (q, E): (q, k), nearest first.

    Reads the vectors once for all queries, where `VectorIndex.search` reads them for each.
    """
    numbers = np.empty((len(queries), 0), np.int64)
    cosines = np.empty((len(queries), 0), np.float32)
    for start, block in zip(vectors.starts, vectors.blocks(), strict=True):
        here = queries @ block.T
        best = np.argpartition(-here, min(k, len(block)) - 1, axis=1)[:, :k]
        numbers = np.concatenate([numbers, best + start], axis=1)
        cosines = np.concatenate([cosines, np.take_along_axis(here, best, axis=1)], axis=1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        numbers = np.take_along_axis(numbers, order, axis=1)
        cosines = np.take_along_axis(cosines, order, axis=1)
    return numbers


def _choose_probes(index: Any, vectors: VectorFolder, queries: NDArray[np.int64], recall: float) -> tuple[int, float]:
    """Lists to read for `recall` at 10 of these vectors of the index, each without itself, and the recall reached."""
    given, k = vectors.rows(queries), 10
    nearest = exact_neighbours(vectors, given, k + 1)
    wanted = [set(row.tolist()) - {int(number)} for row, number in zip(nearest, queries, strict=True)]
    probes = 1
    while True:
        index.nprobe = probes
        hits = [
            len((set(_search_lists(index, vectors, query, k + 1)[0].tolist()) - {int(number)}) & true) / len(true)
            for query, number, true in zip(given, queries, wanted, strict=True)
        ]
        reached = float(np.mean(hits))
        if reached >= recall or probes >= index.nlist:
            return probes, reached
        probes = min(2 * probes, index.nlist)


def _fingerprint(vectors: VectorFolder) -> str:
    return hashlib.sha256((vectors.folder / MANIFEST).read_bytes()).hexdigest()


def _open_approximate(vectors: VectorFolder) -> Any:
    """FAISS's index; None where there is none. Raises OpenVisionError when it belongs to other vectors."""
    note = vectors.folder / NOTE
    if not note.is_file():
        return None
    content = read_json(note)
    if content.get("vectors") != _fingerprint(vectors):
        raise OpenVisionError(
            f"{note} belongs to other vectors than the folder has now; run `openvision index {vectors.folder}` again, "
            "or search with --exact"
        )
    faiss: Any = require("faiss", extra="search")
    try:
        index = faiss.read_index(str(vectors.folder / LISTS), faiss.IO_FLAG_MMAP)
        index.nprobe = check_count("probes", content.get("probes"), 1, index.nlist)
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise OpenVisionError(
            f"{vectors.folder / LISTS} cannot be read: {reason}; run `openvision index {vectors.folder}` again"
        ) from error
    return index

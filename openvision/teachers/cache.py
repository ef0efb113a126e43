"""What a teacher says of the fixed views of every image, computed once and kept on disk.

    CACHE/KEY/features.json          what the features are of: weights, preprocessing, augmentation
    CACHE/KEY/HASH.pooled.npy        unit vectors (samples, views, P) of a shard
    CACHE/KEY/HASH.patches.npy       patch features (samples, views, C, rows, columns), where they are learnt

KEY is a hash of features.json and HASH that of a shard, so features of another teacher, of other views or of changed
shards are not found, and never taken for these. Student and teacher see the same crop in the same colours: a view
follows from the key of its sample (`images.augment.view_generator`), so nothing about it is stored. The teacher reads
it at its own resolution, whatever the student's is.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openvision.data.shards.dataset import ShardDataset
from openvision.data.stored_features import Layout, StoredFeatures, writing_features
from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_text, make_folder, read_json
from openvision.images.augment import Augment, Jitter, apply_jitter, draw_jitter, random_crop, view_generator
from openvision.images.decode import BadSampleError, open_image
from openvision.images.preprocess import to_batch
from openvision.teachers.teacher import Teacher

FACTS = "features.json"
_VERSION = 1
_BATCH = 64
"""Views that the teacher reads at a time."""


@dataclass(frozen=True)
class TeacherCache:
    """Features of one teacher for one kind of views."""

    root: Path
    """Folder that may hold the features of several teachers."""
    facts: JsonObject
    pooled: Layout
    patches: Layout | None

    @staticmethod
    def of(root: Path, teacher: Teacher, augment: Augment, patches: bool) -> "TeacherCache":
        """The cache of `teacher` below `root` for the views of `augment`, with patch features or without.

        Raises OpenVisionError for an augmentation without fixed views.
        """
        if augment.views is None:
            raise OpenVisionError(
                "a cache of teacher features holds fixed views of each image; set augment.views to their number, e.g. 4"
            )
        facts = {
            "version": _VERSION,
            "weights_sha256": teacher.fingerprint(),
            "preprocessing": asdict(teacher.preprocessing),
            "augment": augment.model_dump(mode="json", exclude_defaults=True),
        }
        layout = Layout("patches", teacher.patch_map, augment.views) if patches and teacher.patch_map else None
        # As it is read again: lists where there were tuples.
        facts = json.loads(json.dumps(facts))
        return TeacherCache(root, facts, Layout("pooled", (teacher.pooled_width,), augment.views), layout)

    @property
    def folder(self) -> Path:
        """Where these features are."""
        return self.root / hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The arrays of a shard."""
        return (self.pooled,) if self.patches is None else (self.pooled, self.patches)

    def stored(self) -> tuple[StoredFeatures, ...]:
        """What the loader reads: vectors, and patches where they are kept."""
        return tuple(StoredFeatures(self.folder, layout) for layout in self.layouts)

    def missing(self, datasets: Sequence[ShardDataset]) -> list[tuple[ShardDataset, str, range]]:
        """The shards without features, each content once; raises OpenVisionError for a damaged file."""
        return [
            (dataset, digest, samples)
            for dataset, digest, samples in _shards(datasets)
            if not self._has(digest, samples)
        ]

    def require(self, datasets: Sequence[ShardDataset], title: str) -> None:
        """Raise OpenVisionError, which names the command, when shards have no features."""
        missing = self.missing(datasets)
        if not missing:
            return
        total = len(_shards(datasets))
        raise OpenVisionError(
            f"teacher {title}: {self.root} lacks the features of {len(missing)} of {total} shards{self._nearest()}; "
            "make them with `openvision data teach` and the same recipe"
        )

    def fill(
        self,
        datasets: Sequence[ShardDataset],
        teacher: Teacher,
        *,
        rank: int = 0,
        size: int = 1,
        precision: torch.dtype = torch.float32,
        device: torch.device | None = None,
        threads: int = 1,
        progress: Callable[[int, float], None] = lambda _, __: None,
    ) -> int:
        """Compute what is missing of every `size`-th shard, from `rank` on; returns the number of bad images.

        Features of a bad image are NaN: the loader replaces its sample. Each shard appears when it is complete, so a
        command that was stopped goes on behind the last one. `progress` is called with views done and their share.
        """
        atomic_write_text(self.folder / FACTS, json.dumps(self.facts, indent=2) + "\n")
        mine = [shard for shard in _shards(datasets)[rank::size] if not self._has(*shard[1:])]
        views, done, bad = self.pooled.views, 0, 0
        total = views * sum(len(samples) for _, _, samples in mine)
        device = device or torch.device("cpu")
        with ThreadPoolExecutor(max(1, threads)) as pool:
            for dataset, digest, samples in mine:
                with writing_features(self.folder, digest, len(samples), self.layouts) as writer:
                    for some in _chunks(samples, max(1, _BATCH // views)):
                        crops = list(pool.map(lambda index, data=dataset: self._views(data, index, teacher), some))
                        bad += sum(one is None for one in crops)
                        writer.append(self._features(crops, teacher, device, precision))
                        done += len(some) * views
                        progress(done, done / total)
        return bad

    def bytes_for(self, missing: Sequence[tuple[ShardDataset, str, range]]) -> int:
        """Bytes that the features of these shards take; raises OpenVisionError when the disk has no room for them."""
        samples = sum(len(numbers) for _, _, numbers in missing)
        needed = sum(layout.bytes_for(samples) for layout in self.layouts)
        free = shutil.disk_usage(make_folder(self.root)).free
        if needed > free:
            raise OpenVisionError(
                f"teacher features of {samples} samples take {needed / 1e9:.1f} GB, and {self.root} has "
                f"{free / 1e9:.1f} GB free; set teacher.0.cache to a larger disk, or augment.views lower"
            )
        return needed

    def _has(self, digest: str, samples: range) -> bool:
        if not all(layout.path(self.folder, digest).exists() for layout in self.layouts):
            return False
        for stored in self.stored():
            stored.check(digest, len(samples))
        return True

    def _views(
        self, dataset: ShardDataset, index: int, teacher: Teacher
    ) -> tuple[list[np.ndarray], list[Jitter]] | None:
        """The crops of all views of a sample and their changes of colour; None for a bad image."""
        augment = Augment.model_validate(self.facts["augment"])
        try:
            key, data = dataset.image(index)
            image = open_image(data)
            drawn = [view_generator(key, view) for view in range(self.pooled.views)]
            crops = [random_crop(image, rng, teacher.preprocessing.size, augment) for rng in drawn]
        except BadSampleError:
            return None
        return crops, [draw_jitter(rng, augment) for rng in drawn]

    @torch.no_grad()
    def _features(
        self,
        crops: Sequence[tuple[list[np.ndarray], list[Jitter]] | None],
        teacher: Teacher,
        device: torch.device,
        precision: torch.dtype,
    ) -> list[np.ndarray]:
        """Rows of each array for all views of some samples."""
        views = self.pooled.views
        rows = [np.full((len(crops) * views, *layout.shape), np.nan, dtype=np.float32) for layout in self.layouts]
        good = [place for place, one in enumerate(crops) if one is not None]
        if not good:
            return rows
        found = [one for one in crops if one is not None]
        images = apply_jitter(
            to_batch([crop for some, _ in found for crop in some]), [jitter for _, some in found for jitter in some]
        )
        places = np.concatenate([np.arange(place * views, (place + 1) * views) for place in good])
        for chunk, at in zip(images.split(_BATCH), np.split(places, range(_BATCH, len(places), _BATCH)), strict=True):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
                features = teacher(chunk.to(device))
            kept: list[Tensor | None] = [features.pooled, features.patches]
            for array, values in zip(rows, kept, strict=False):
                assert values is not None
                array[at] = values.float().cpu().numpy()
        return rows

    def _nearest(self) -> str:
        """What sets the most similar other features below the same folder apart, for a message."""
        others: list[list[str]] = []
        for file in sorted(self.root.glob(f"*/{FACTS}")):
            try:
                stored = _flat(read_json(file))
            except OpenVisionError:
                # Of features that this run does not read.
                continue
            own = _flat(self.facts)
            others.append(sorted(name for name in stored | own if stored.get(name) != own.get(name)))
        others = [names for names in others if names]
        if not others:
            return ""
        return f" (it holds some that differ in {', '.join(min(others, key=len))})"


def _shards(datasets: Sequence[ShardDataset]) -> list[tuple[ShardDataset, str, range]]:
    """Every shard with samples, each content once."""
    found = {digest: (dataset, digest, samples) for dataset in datasets for digest, samples in dataset.places().items()}
    return list(found.values())


def _chunks(numbers: range, size: int) -> Iterator[range]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _flat(content: JsonObject, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat

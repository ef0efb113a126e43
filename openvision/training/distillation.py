"""Distillation: a student learns beside its own losses what frozen teachers say of the same images.

Teachers read a batch once, before it is cut into micro-batches; their features travel with its rows. Those of a teacher
with a cache come with the batch, and the teacher itself is not kept (`teachers/cache.py`). The student's
projections to the teachers' widths are parameters of the run, not of the model: they are trained, sharded and saved
with it, and left out of what is evaluated and written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.data.batch import Batch
from openvision.data.shards.dataset import ShardDataset
from openvision.errors import OpenVisionError
from openvision.images.augment import Augment
from openvision.models.layers import Block, LayerNorm
from openvision.models.openvision import OpenVisionOutput
from openvision.objectives.distillation import cosine_distance, similarity_divergence
from openvision.recipe.sections import TeacherTable
from openvision.runtime import autocast
from openvision.teachers.cache import TeacherCache
from openvision.teachers.load import load_teacher
from openvision.teachers.teacher import Teacher
from openvision.training.objective import Embeds, ImageTextObjective, Objective, Terms
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.parallel import DistributedModel

HEADS = "teacher_heads"
"""Name of the projections among the modules of a model in training."""


@dataclass(frozen=True)
class TaughtBatch(Batch):
    """A batch with what its teachers say of it."""

    vectors: tuple[Tensor, ...] = ()
    """(B, P) unit vectors of each teacher."""
    patches: tuple[Tensor, ...] = ()
    """(B, N, C) features of each teacher at the student's patches; (B, 0, C) where nobody reads them."""
    share: Tensor = field(default_factory=lambda: torch.empty(0))
    """(B,): one over the number of samples of the whole batch."""


@dataclass(frozen=True)
class Taught:
    """A teacher, and what of it the recipe asks for."""

    teacher: Teacher | None
    """None where a cache has its features."""
    table: TeacherTable
    pooled_width: int
    """Channels of its pooled vector."""
    patch_width: int | None
    """Channels of a patch; None without a map."""
    description: str
    """One line for the log."""
    cache: TeacherCache | None = None

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each of its terms, by the name it has in the log."""
        kinds = {"pooled": self.table.pooled, "patches": self.table.patches, "similarity": self.table.similarity}
        return {f"{self.table.title}_{kind}": weight for kind, weight in kinds.items() if weight}


def load_teachers(
    tables: Sequence[TeacherTable], augment: Augment | None = None, datasets: Sequence[ShardDataset] = ()
) -> list[Taught]:
    """The teachers of a recipe, on the CPU, those with a cache for `datasets` and the views of `augment` read from it.

    Raises OpenVisionError for one without patches that are to be learnt, and for a cache that lacks features.
    """
    taught = []
    for table in tables:
        teacher = open_teacher(table)
        kept, cache, description = teacher, None, teacher.describe()
        if table.cache is not None:
            cache = cache_of(table, teacher, augment or Augment())
            cache.require(datasets, table.title)
            kept, description = None, f"{description}, features from {cache.folder}"
        taught.append(Taught(kept, table, teacher.pooled_width, teacher.patch_width, description, cache))
    return taught


def open_teacher(table: TeacherTable) -> Teacher:
    """The teacher of a table, on the CPU; raises OpenVisionError for one without what is to be learnt."""
    teacher = load_teacher(table.source, table.library, table.resolution)
    if table.patches and teacher.patch_width is None:
        raise OpenVisionError(
            f"teacher {table.title}: {table.source} gives no grid of patch features that could be matched with the "
            "student's; set its patches to 0"
        )
    if (table.pooled or table.similarity) and not teacher.pooled_is_trained:
        raise OpenVisionError(
            f"teacher {table.title}: {table.source} only captions, so its pooled vector was never trained; set its "
            "pooled and similarity to 0 and learn its patches"
        )
    return teacher


def cache_of(table: TeacherTable, teacher: Teacher, augment: Augment) -> TeacherCache:
    """The cache that a table names."""
    assert table.cache is not None
    return TeacherCache.of(Path(table.cache).expanduser(), teacher, augment, patches=table.patches > 0)


class TeacherHeads(nn.Module):
    """Projections of the student's pooled vector and patch tokens to the widths of its teachers."""

    def __init__(self, width: int, taught: Sequence[Taught]) -> None:
        super().__init__()
        self.pooled = nn.ModuleList(
            nn.Linear(width, one.pooled_width) if one.table.pooled else nn.Identity() for one in taught
        )
        # The tokens of the last block have no norm behind them yet.
        self.patches = nn.ModuleList(
            nn.Sequential(LayerNorm(width), nn.Linear(width, one.patch_width or 0))
            if one.table.patches
            else nn.Identity()
            for one in taught
        )

    def init_weights(self) -> None:
        """Nothing beyond what the layers initialise themselves."""


def teach(batch: Batch, taught: Sequence[Taught], patch_size: int, chunks: int, precision: torch.dtype) -> TaughtBatch:
    """The batch with the features of its teachers, which read it in `chunks`; patches at the student's grid."""
    grid = (batch.images.shape[-2] // patch_size, batch.images.shape[-1] // patch_size)
    pieces = max(1, min(chunks, len(batch.images)))
    vectors, patches = [], []
    stored = iter(batch.features)
    for one in taught:
        if one.teacher is None:
            found = [_cached(one, stored, grid, pieces, precision)]
        else:
            found = [_features(one, one.teacher, images, grid, precision) for images in batch.images.chunk(pieces)]
        vectors.append(torch.cat([pooled for pooled, _ in found]))
        patches.append(torch.cat([tokens for _, tokens in found]))
    own = {name.name: getattr(batch, name.name) for name in fields(batch) if name.name != "features"}
    share = torch.full((len(batch.images),), 1 / len(batch.images), device=batch.images.device)
    return TaughtBatch(**own, vectors=tuple(vectors), patches=tuple(patches), share=share)


@torch.no_grad()
def _features(
    one: Taught, teacher: Teacher, images: Tensor, grid: tuple[int, int], precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    with autocast(images.device.type, precision):
        features = teacher(images)
    if not one.table.patches or features.patches is None:
        return features.pooled, images.new_empty(len(images), 0, 1)
    return features.pooled, _at_grid(features.patches, grid, precision)


def _cached(
    one: Taught, stored: Iterator[Tensor], grid: tuple[int, int], pieces: int, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same from what the loader has read, (B, P) and (B, C, rows, columns)."""
    pooled = next(stored).float()
    if not one.table.patches:
        return pooled, pooled.new_empty(len(pooled), 0, 1)
    return pooled, torch.cat([_at_grid(some.float(), grid, precision) for some in next(stored).chunk(pieces)])


def _at_grid(spatial: Tensor, grid: tuple[int, int], precision: torch.dtype) -> Tensor:
    """A map (B, C, rows, columns) -> tokens (B, N, C) at the student's grid."""
    if spatial.shape[-2:] != grid:
        spatial = F.interpolate(spatial, grid, mode="bilinear", antialias=True, align_corners=False)
    return spatial.flatten(2).transpose(1, 2).to(precision)


@dataclass(frozen=True)
class DistilledObjective:
    """The objective of a contrastive student, and what its teachers add to it."""

    inner: ImageTextObjective
    heads: TeacherHeads
    taught: tuple[Taught, ...]

    @property
    def weights(self) -> dict[str, float]:
        """Those of the student's own losses and of each teacher."""
        weights = dict(self.inner.weights)
        for one in self.taught:
            weights |= one.weights
        return weights

    @property
    def vision_blocks(self) -> Sequence[Block]:
        """Those of the student."""
        return self.inner.vision_blocks

    def embed(self, batch: Batch) -> Embeds:
        """The student's embeddings; similarities need no others."""
        return self.inner.embed(batch)

    def forward(self, batch: Batch, randomness: SampleRandomness, target_tokens: Tensor) -> tuple[Embeds, Terms]:
        """Embeddings, the caption loss, and the distances to pooled vectors and patches: sums over samples."""
        output = self.inner.output(batch)
        embeds, terms = self.inner.terms(output, batch, target_tokens)
        return embeds, terms | self._distances(output, batch)

    def coupled(self, embeds: Embeds, batch: Batch) -> Terms:
        """The contrastive terms, and the divergence of the similarities of the batch's images."""
        terms = self.inner.coupled(embeds, batch)
        assert isinstance(batch, TaughtBatch)
        for one, vectors in zip(self.taught, batch.vectors, strict=True):
            if one.table.similarity:
                terms[f"{one.table.title}_similarity"] = similarity_divergence(
                    embeds[0], vectors, one.table.temperature, self.inner.group
                )
        return terms

    def equal_texts(self, batch: Batch) -> Terms:
        """As of the student's own objective."""
        return self.inner.equal_texts(batch)

    def taught_batch(self, batch: Batch, micro_batches: int, precision: torch.dtype) -> TaughtBatch:
        """The batch with the features of the teachers."""
        return teach(batch, self.taught, self.inner.model.config.vision.patch_size, micro_batches, precision)

    def _distances(self, output: OpenVisionOutput, batch: Batch) -> Terms:
        assert isinstance(batch, TaughtBatch)
        terms: Terms = {}
        for number, one in enumerate(self.taught):
            title = one.table.title
            if one.table.pooled:
                projected = self.heads.pooled[number](output.vision.pooled)
                terms[f"{title}_pooled"] = cosine_distance(projected, batch.vectors[number], batch.share)
            if one.table.patches:
                projected = self.heads.patches[number](output.vision.patch_tokens)
                terms[f"{title}_patches"] = cosine_distance(projected, batch.patches[number], batch.share)
        return terms


def distilled(objective: Objective, model: DistributedModel, taught: Sequence[Taught]) -> Objective:
    """The objective with what `taught` adds to it; itself without teachers."""
    if not taught:
        return objective
    assert isinstance(objective, ImageTextObjective)
    heads = model.module.get_submodule(HEADS)
    assert isinstance(heads, TeacherHeads)
    return DistilledObjective(objective, heads, tuple(taught))

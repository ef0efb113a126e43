"""The data of a run: its sources with their weights and captions, and the loader of a stage."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from openvision.data.batch import Batch
from openvision.data.distinct import Grid
from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.mixture import Mixture, Ordering
from openvision.data.order import Interleaved
from openvision.data.shards.dataset import ShardDataset
from openvision.data.shards.store import join_folder
from openvision.data.stored_features import StoredFeatures
from openvision.errors import OpenVisionError
from openvision.recipe.schema import Recipe
from openvision.recipe.sections import Data, Source, Stage
from openvision.runtime import Processes, send
from openvision.text.tokenizer import Tokenizer
from openvision.training.checkpoint.folders import Progress
from openvision.untrusted import one_line

# A fine-tune that reads its images more often than this says so before it starts; a usual number of passes.
MANY_PASSES = 30
FEW_PASSES = 10


def open_training_data(data: Data, folder: str | Path, reads_synthetic: bool) -> Mixture:
    """The training shards that `data` names below `folder`, a path or a URL.

    Raises OpenVisionError for a folder that is missing or holds no captions of the names asked for, synthetic ones
    included if the run `reads_synthetic`.
    """
    sources = (Source(folder=data.train),) if isinstance(data.train, str) else data.train
    datasets = [_open(data, folder, source) for source in sources]
    for dataset in datasets:
        wanted = (dataset.alt_key, dataset.synthetic_key) if reads_synthetic else (dataset.alt_key,)
        dataset.require_captions(*wanted)
    if data.order == "blocks":
        for dataset in datasets:
            dataset.read_ahead()
    return Mixture(datasets, [source.weight for source in sources], [source.folder for source in sources])


def open_validation_data(data: Data, folder: str | Path) -> ShardDataset | None:
    """The shards that are evaluated during training; None when the recipe names none."""
    return _open(data, folder, Source(folder=data.validation)) if data.validation else None


def require_same_data(processes: Processes, datasets: Sequence[Mixture | ShardDataset | None]) -> None:
    """Raise OpenVisionError in every process where one of them sees other shards than the main one.

    Each lists the folders itself; shards that are still being written, or an old listing of a network file system,
    would silently give the processes different samples.
    """
    seen = processes.all_gather([None if one is None else one.manifest_hash() for one in datasets])
    if different := [rank for rank, hashes in enumerate(seen) if hashes != seen[0]]:
        raise OpenVisionError(
            f"process {different[0]} sees other shards than process 0; train on data that nobody is writing, and "
            "start again when all machines list the same files"
        )


def ordering_of(data: Data) -> Ordering:
    """The order in which the run reads its samples."""
    return Ordering(data.order, data.block, data.window)


def open_loader(
    recipe: Recipe,
    stage: Stage,
    dataset: Mixture,
    tokenizer: Tokenizer,
    processes: Processes,
    start: int,
    run_folder: Path,
    features: tuple[StoredFeatures, ...] = (),
) -> Loader:
    """Batches of a stage for this process, from sample `start` of the run on, with `features` of their views."""
    rank = processes.rank
    return Loader(
        dataset,
        tokenizer,
        InputSpec(
            stage.resolution,
            recipe.context_length,
            recipe.caption_length,
            recipe.augment,
            recipe.shapes_of(stage),
            recipe.run.trim_texts,
            features,
        ),
        batch_size=stage.batch_size,
        seed=recipe.seed,
        start=start,
        options=LoaderOptions(
            ordering=ordering_of(recipe.data),
            distinct=recipe.is_contrastive,
            threads=recipe.run.loader_threads,
            workers=recipe.run.loader_workers,
            rank=rank,
            world_size=processes.size,
            reject_budget=recipe.data.reject_budget,
            rejects_file=run_folder / (f"rejects-{rank:05d}.jsonl" if rank else "rejects.jsonl"),
        ),
    )


def check_batches(recipe: Recipe, data: Mixture) -> None:
    """Raise OpenVisionError when an image would be in a contrastive batch twice, whatever the order."""
    if not recipe.is_contrastive:
        return
    for stage in recipe.stages:
        data.distinct_stream(recipe.seed, ordering_of(recipe.data), Grid(stage.batch_size))
    holders: dict[str, str] = {}
    for name, source in zip(data.names, data.sources, strict=True):
        for shard, digest in source.shard_hashes().items():
            if digest in holders:
                raise OpenVisionError(
                    f"sources {holders[digest]} and {name} hold the same shard ({shard}), so that an image could be in "
                    "a contrastive batch twice; name one of them, with the sum of their weights"
                )
        holders |= dict.fromkeys(source.shard_hashes().values(), name)


def order_has_changed(recipe: Recipe, data: Mixture, progress: Progress) -> bool:
    """Whether what is left of a run reads other samples than in the order that could repeat an image in a batch."""
    if not recipe.is_contrastive:
        return False
    begin, taken = progress.position, progress.stage_step
    for stage in recipe.stages[progress.stage :]:
        end = begin + (stage.steps - taken) * stage.batch_size
        grid = Grid(stage.batch_size, begin)
        if begin < end and data.distinct_stream(recipe.seed, ordering_of(recipe.data), grid).differs(begin, end):
            return True
        begin, taken = end, 0
    return False


def describe_passes(recipe: Recipe, data: Mixture) -> list[str]:
    """Lines about how often a run reads its images, where that is much for a fine-tune."""
    total = sum(stage.steps * stage.batch_size for stage in recipe.stages)
    read = Interleaved(data.weights).counts(total)
    lines = []
    for name, source, count in zip(data.names, data.sources, read, strict=True):
        passes = count / len(source)
        if recipe.start is not None and passes >= MANY_PASSES:
            lines.append(
                f"this fine-tune makes {passes:,.0f} passes over the {len(source):,} images of {name}: weights that "
                f"were trained before learn so few by heart; {FEW_PASSES} passes are {FEW_PASSES * len(source):,} "
                "samples (stages.N.samples)"
            )
    return lines


class DeviceBatches(Iterator[Batch]):
    """Batches on the device of a run; on an accelerator the next one is copied while this one is worked on."""

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self._ahead: Batch | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __next__(self) -> Batch:
        batch, self._ahead = self._ahead or self._sent(next(self.batches)), None
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            for tensor in (*(getattr(batch, name) for name in _ON_DEVICE), *batch.features):
                # The memory must not be used again before the work of this step has read it.
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return batch

    def prefetch(self) -> None:
        """Fetch the next batch and begin to copy it; to be called when the work of a step is queued."""
        if self.device.type != "cpu" and self._ahead is None:
            self._ahead = self._sent(next(self.batches))

    def _sent(self, batch: Batch) -> Batch:
        """The batch with what the model reads on the device; the mask of the targets stays on the CPU."""
        if self.device.type == "cpu":
            return batch
        with torch.cuda.stream(self._stream):
            sent = {name: send(getattr(batch, name), self.device) for name in _ON_DEVICE}
            return replace(batch, **sent, features=tuple(send(one, self.device) for one in batch.features))


REMARKS = {
    "not_utf8": "texts that are not UTF-8, read as Windows-1252",
    "null_in_list": "caption lists with nulls, which are left out",
    "unknown_words": "texts without a word of the vocabulary",
}
"""What the log says of samples that are used although their texts are odd."""
_ON_DEVICE = ("images", "alt_ids", "sentence_ids", "labels")


def describe_left_out(data: Mixture) -> list[str]:
    """Lines about what the indices of the training shards leave out: it is no sample, so the loader never counts it."""
    return [
        f"left out of {source.folder}, {reason}: {count}"
        for source in data.sources
        for reason, count in sorted(source.left_out.items())
    ]


def describe_unused(loader: Loader, context_length: int | None, reads_synthetic: bool) -> list[str]:
    """Lines about samples and texts of a stage that this process could not use as they are."""
    lines = [f"rejected samples, {reason}: {count}" for reason, count in sorted(loader.rejected.items())]
    if loader.unlisted is not None:
        lines.append(f"not all rejected samples are listed: {loader.unlisted}")
    if loader.captions_missing and reads_synthetic:
        lines.append(f"samples without a synthetic caption, alt-text used: {loader.captions_missing}")
    if loader.texts_cut and context_length is not None:
        lines.append(f"texts longer than {context_length} ids, cut: {loader.texts_cut}")
    for reason, count in sorted(loader.remarks.items()):
        named = loader.remarked[reason]
        keys = ", ".join(named) + (", ..." if count > len(named) else "")
        command = "openvision data verify" + (" --tokenizer" if reason == "unknown_words" else "")
        lines.append(f"{REMARKS[reason]}: {count} ({one_line(keys)}); `{command}` lists all")
    return lines


def _open(data: Data, folder: str | Path, source: Source) -> ShardDataset:
    return ShardDataset(
        join_folder(folder, source.folder),
        synthetic_key=source.synthetic_key or data.synthetic_key,
        alt_key=source.alt_key or data.alt_key,
    )

"""The stream of batches is a function of (seed, position) and of nothing else."""

import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision.data.batch import Batch
from openvision.data.distinct import DistinctOrder, Grid
from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.mixture import Mixture, Ordering
from openvision.data.order import Interleaved, Order
from openvision.data.shards.dataset import Sample, ShardDataset, ShardWriter
from openvision.errors import OpenVisionError
from openvision.files import read_json_lines
from openvision.images.decode import BadSampleError
from openvision.text.tokenizer import Tokenizer
from tests.conftest import draw


@pytest.fixture(scope="module")
def dataset(shapes_folder) -> ShardDataset:
    return ShardDataset(shapes_folder / "train")


@pytest.fixture(scope="module")
def tokenizer(dataset) -> Tokenizer:
    return Tokenizer.train([text for sample in dataset for text in (sample.alt, sample.synthetic)], 120)


class Broken(ShardDataset):
    """Shards of which the samples `bad` cannot be used."""

    def __init__(self, folder: Path, bad: set[int]) -> None:
        super().__init__(folder)
        self.bad = bad

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSampleError("undecodable", "it was made unusable")
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def plain_samples(tmp_path_factory) -> Path:
    """24 samples whose keys are their numbers."""
    folder = tmp_path_factory.mktemp("plain")
    with ShardWriter(folder) as writer:
        for number in range(24):
            writer.write(f"{number:02d}", draw("red", "bar", 16), "png", f"number {number}", {})
    return folder


def loader(dataset, tokenizer, start=0, threads=1, seed=3, batch_size=6, **options) -> Loader:
    return Loader(
        dataset,
        tokenizer,
        InputSpec(resolution=16, context_length=12, caption_length=20),
        batch_size=batch_size,
        seed=seed,
        start=start,
        options=LoaderOptions(threads=threads, **options),
    )


def take(count: int, *arguments, **keywords) -> list[Batch]:
    with loader(*arguments, **keywords) as stream:
        return list(itertools.islice(stream, count))


def same(one: Batch, other: Batch) -> bool:
    names = ("images", "alt_ids", "sentence_ids", "labels", "label_mask")
    return one.keys == other.keys and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_shapes_and_layout(dataset, tokenizer):
    (batch,) = take(1, dataset, tokenizer)
    assert batch.images.shape == (6, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.alt_ids.shape == batch.sentence_ids.shape == (6, 12)
    assert batch.labels.shape == batch.label_mask.shape == (6, 20)
    assert (batch.alt_ids[:, 0] == tokenizer.bos_id).all()
    assert (batch.alt_ids[:, -1] == tokenizer.cls_id).all()
    for row, key in enumerate(batch.keys):
        assert tokenizer.decode(batch.alt_ids[row].numpy()) == f"{key.replace('-', ' ')} clipart"
        assert tokenizer.decode(batch.labels[row].numpy()).startswith("a ")


@settings(max_examples=12, deadline=None)
@given(start=st.integers(0, 60), threads=st.sampled_from([1, 2, 4]))
def test_a_stream_resumes_at_any_position_and_thread_count(dataset, tokenizer, start, threads):
    position = 6 * (start // 6)
    whole = take(position // 6 + 2, dataset, tokenizer)
    resumed = take(2, dataset, tokenizer, start=position, threads=threads)
    assert all(same(one, other) for one, other in zip(whole[-2:], resumed, strict=True))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), batch_size=st.integers(1, 40))
def test_every_epoch_visits_every_sample_once(dataset, tokenizer, seed, batch_size):
    # With at least two batches of samples also where a batch repeats none.
    stream = loader(dataset, tokenizer, seed=seed, batch_size=batch_size, distinct=batch_size <= 8)
    visits = [stream.sample_at(position)[1] for position in range(3 * len(dataset))]
    stream.close()
    epochs = [visits[start : start + len(dataset)] for start in range(0, len(visits), len(dataset))]
    assert all(sorted(epoch) == list(range(len(dataset))) for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_far_positions_cost_nothing(dataset, tokenizer):
    (batch,) = take(1, dataset, tokenizer, start=10**12)
    assert len(set(batch.keys)) >= 3


def test_seeds_differ(dataset, tokenizer):
    assert not same(*take(1, dataset, tokenizer, seed=1), *take(1, dataset, tokenizer, seed=2))


def test_a_batch_larger_than_the_data_repeats_it(dataset, tokenizer):
    (batch,) = take(1, dataset, tokenizer, batch_size=40, distinct=False)
    assert len(batch.keys) == 40
    assert set(batch.keys) == {sample.key for sample in dataset}
    with pytest.raises(
        OpenVisionError, match=r"holds 16 images, fewer than a batch of 40: .* batch_size to at most 16"
    ):
        loader(dataset, tokenizer, batch_size=40)


def spelt(length: int, seed: int) -> Order:
    """Permutations of few samples, which Grain's shuffle takes milliseconds for."""
    epochs: dict[int, list[int]] = {}

    class Spelt:
        def __getitem__(self, position: int) -> int:
            epoch, place = divmod(position, length)
            if epoch not in epochs:
                epochs[epoch] = random.Random(1000 * seed + epoch).sample(range(length), length)
            return epochs[epoch][place]

    return Spelt()


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.3, 1.0, 2.5, 7.0]), min_size=1, max_size=3),
    batch_size=st.integers(2, 24),
    more=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    start=st.integers(0, 100),
    seed=st.integers(0, 99),
)
def test_no_sample_is_in_a_batch_twice_whatever_the_sources(weights, batch_size, more, start, seed):
    mixed = Interleaved(weights)
    lengths = [most + extra for most, extra in zip(mixed.most(batch_size), more, strict=False)]
    orders = [spelt(length, seed + number) for number, length in enumerate(lengths)]
    order = DistinctOrder(mixed, orders, lengths, ["data"] * len(lengths), Grid(batch_size, start))
    for begin in range(start, start + 20 * batch_size, batch_size):
        assert len({order[begin + row] for row in range(batch_size)}) == batch_size
    changed = [
        position
        for position in range(start, start + 20 * batch_size)
        if order[position] != (mixed[position][0], orders[mixed[position][0]][mixed[position][1]])
    ]
    assert order.differs(start, start + 20 * batch_size) == bool(changed)
    assert changed == [] or order.differs(changed[0], changed[0] + 1)
    if len(weights) == 1 and lengths[0] >= 2 * batch_size:
        assert sorted(order[lengths[0] + place][1] for place in range(lengths[0])) == list(range(lengths[0]))
        # Only where an epoch ends inside a batch, and within one batch of samples from there.
        assert all(position >= lengths[0] and position % lengths[0] < batch_size for position in changed)


@settings(max_examples=6, deadline=None)
@given(
    bad=st.sets(st.integers(0, 23), max_size=6),
    batch_size=st.sampled_from([4, 8, 12, 16]),
    world=st.sampled_from([1, 2, 4]),
    start=st.integers(0, 3),
)
def test_replacements_are_not_in_the_batch_either(plain_samples, tokenizer, bad, batch_size, world, start):
    data = Broken(plain_samples, bad)
    position = batch_size * start + 3
    options = {"batch_size": batch_size, "start": position}
    whole = take(3, data, tokenizer, **options)
    for batch in whole:
        assert len(set(batch.keys)) == batch_size
        assert not bad & {int(key) for key in batch.keys}
    shares = [take(3, data, tokenizer, **options, rank=rank, world_size=world) for rank in range(world)]
    assert [row for number in range(3) for row in joined([share[number] for share in shares])] == joined(whole)
    resumed = take(1, data, tokenizer, batch_size=batch_size, start=position + 2 * batch_size)
    assert joined(resumed) == joined(whole[2:])


def test_too_few_usable_samples_for_a_batch(plain_samples, tokenizer):
    data = Broken(plain_samples, {1, 2, 3})
    message = r"only 21 of 24 samples can be used, fewer than the 22 different ones of a batch \(undecodable \d\); set "
    with loader(data, tokenizer, batch_size=22) as stream, pytest.raises(Exception, match=message):
        next(stream)


def spoiled(folder, dataset, bad: dict[str, tuple[bytes | None, str | None]]) -> ShardDataset:
    with ShardWriter(folder) as writer:
        for sample in dataset:
            image, text = bad.get(sample.key, (None, None))
            meta = {**sample.meta, "synthetic": sample.synthetic}
            alt = sample.alt if text is None else text
            writer.write(sample.key, sample.image if image is None else image, "png", alt, meta)
    return ShardDataset(folder)


def test_bad_samples_are_replaced_and_counted_by_reason(tmp_path, dataset, tokenizer):
    data = spoiled(tmp_path, dataset, {"red-bar": (b"not an image", None), "blue-pole": (None, "  ")})
    with loader(data, tokenizer, batch_size=16, distinct=False) as stream:
        batch = next(stream)
        assert stream.rejected == {"undecodable": 1, "empty_text": 1}
    assert len(batch.keys) == 16
    assert not {"red-bar", "blue-pole"} & set(batch.keys)


def test_too_many_bad_samples_end_the_run(tmp_path, dataset, tokenizer, monkeypatch):
    monkeypatch.setattr("openvision.data.loader._BUDGET_COUNTS_FROM", 200)
    data = spoiled(tmp_path, dataset, {"red-bar": (b"not an image", None)})
    with (
        loader(data, tokenizer, batch_size=8) as stream,
        pytest.raises(OpenVisionError, match=r"1 of 16 samples cannot be used \(undecodable 1\), more than 1.0%"),
    ):
        for _ in range(50):
            next(stream)
    # A bad one that is met in every epoch is one bad sample.
    assert 180 < stream.position < 200
    assert stream.rejected == {"undecodable": 1}


def test_long_texts_are_cut_and_counted(tmp_path, dataset, tokenizer):
    data = spoiled(tmp_path, dataset, {"red-bar": (None, "red bar " * 30)})
    with loader(data, tokenizer, batch_size=16) as stream:
        batch = next(stream)
        assert stream.texts_cut == 1
    (row,) = (index for index, key in enumerate(batch.keys) if key == "red-bar")
    assert batch.alt_ids[row, -2:].tolist() == [tokenizer.eos_id, tokenizer.cls_id]


def test_nothing_but_bad_samples(tmp_path, dataset, tokenizer):
    data = spoiled(tmp_path, dataset, {sample.key: (b"", None) for sample in dataset})
    with loader(data, tokenizer) as stream, pytest.raises(Exception, match="only 0 of 16 samples can be used"):
        next(stream)
    with (
        loader(data, tokenizer, distinct=False) as stream,
        pytest.raises(Exception, match=r"16 samples in a row cannot be used \(undecodable 16\)"),
    ):
        next(stream)


def test_sentences_vary_and_targets_do_not(dataset, tokenizer):
    batches = take(8, dataset, tokenizer, batch_size=16)
    sentences = {tuple(row) for batch in batches for row in batch.sentence_ids.numpy()}
    targets = {tuple(row) for batch in batches for row in batch.labels.numpy()}
    assert len(targets) == len(dataset)
    assert len(sentences) > len(dataset)
    assert np.mean([len(set(batch.keys)) for batch in batches]) == 16


# Processes, workers, mixtures, rejects.


def joined(parts: list[Batch]) -> list[tuple[str, bytes, bytes]]:
    """Rows of the batches of all processes, in the order of the global batch."""
    return [
        (key, part.images[row].numpy().tobytes(), part.sentence_ids[row].numpy().tobytes())
        for part in parts
        for row, key in enumerate(part.keys)
    ]


@settings(max_examples=8, deadline=None)
@given(
    worlds=st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=4),
    stops=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    order=st.sampled_from([Ordering(), Ordering("blocks", block=3, window=7)]),
)
def test_any_number_of_processes_stopped_anywhere_sees_the_same_batches(dataset, tokenizer, worlds, stops, order):
    total = sum(stops[: len(worlds)])
    whole = take(total, dataset, tokenizer, batch_size=8, ordering=order)
    position, rows = 0, []
    for world, count in zip(worlds, stops, strict=False):
        shares = [
            take(count, dataset, tokenizer, start=position, batch_size=8, rank=rank, world_size=world, ordering=order)
            for rank in range(world)
        ]
        rows += [row for number in range(count) for row in joined([share[number] for share in shares])]
        position += 8 * count
    assert rows == joined(whole)
    epochs = [[row[0] for row in rows[start : start + len(dataset)]] for start in range(0, len(rows), len(dataset))]
    complete = [epoch for epoch in epochs if len(epoch) == len(dataset)]
    assert all(len(set(epoch)) == len(dataset) for epoch in complete)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_worker_processes_change_nothing(dataset, tokenizer, workers):
    plain = take(3, dataset, tokenizer, start=12)
    worked = take(3, dataset, tokenizer, start=12, workers=workers, threads=2)
    assert all(same(one, other) for one, other in zip(plain, worked, strict=True))


def test_a_loader_closes_while_its_workers_still_send(dataset, tokenizer):
    with loader(dataset, tokenizer, workers=2) as stream:
        next(stream)
        # The workers have filled their queues, and end with batches in them.
        time.sleep(0.5)


def test_processes_must_divide_the_batch(dataset, tokenizer):
    with pytest.raises(OpenVisionError, match="a batch of 6 cannot be divided among 4 processes"):
        loader(dataset, tokenizer, world_size=4)


def test_a_mixture_gives_each_source_its_share_and_its_epochs(dataset, tokenizer, shapes_folder):
    other = ShardDataset(shapes_folder / "validation")
    mixture = Mixture([dataset, other], [3, 1], ["web", "small"])
    batches = take(12, mixture, tokenizer, batch_size=8)
    keys = [key for batch in batches for key in batch.keys]
    web = [key for key in keys if key.startswith("web/")]
    assert len(web) == 72
    assert sorted(web[: len(dataset)]) == sorted(f"web/{sample.key}" for sample in dataset)
    small = [key for key in keys if key.startswith("small/")]
    assert sorted(small[: len(other)]) == sorted(f"small/{sample.key}" for sample in other)
    assert mixture.manifest_hash() not in (dataset.manifest_hash(), other.manifest_hash())


def test_mixtures_that_mean_nothing(dataset):
    with pytest.raises(OpenVisionError, match="named twice"):
        Mixture([dataset, dataset])
    with pytest.raises(OpenVisionError, match="2 sources have 1 weights"):
        Mixture([dataset, dataset], [1], ["a", "b"])
    with pytest.raises(OpenVisionError, match="not all 0"):
        Mixture([dataset, dataset], [0, 0], ["a", "b"])
    with pytest.raises(OpenVisionError, match="no source"):
        Mixture([])


def test_rejects_are_listed_once_with_their_reason(tmp_path, dataset, tokenizer):
    data = spoiled(tmp_path / "data", dataset, {"red-bar": (b"not an image", None), "blue-pole": (None, "  ")})
    path = tmp_path / "rejects.jsonl"
    for _ in range(2):
        with loader(data, tokenizer, batch_size=16, rejects_file=path, distinct=False) as stream:
            assert [len(next(stream).keys) for _ in range(2)] == [16, 16]
    listed = {line["key"]: line["reason"] for line in read_json_lines(path)}
    assert listed == {"red-bar": "undecodable", "blue-pole": "empty_text"}
    assert len(path.read_text().splitlines()) == 2


def test_the_budget_is_what_was_asked_for(tmp_path, dataset, tokenizer, monkeypatch):
    monkeypatch.setattr("openvision.data.loader._BUDGET_COUNTS_FROM", 200)
    data = spoiled(tmp_path, dataset, {"red-bar": (b"not an image", None)})
    with loader(data, tokenizer, batch_size=64, reject_budget=0.2, distinct=False) as stream:
        for _ in range(5):
            next(stream)


def test_missing_captions_are_counted(tmp_path, dataset, tokenizer):
    with ShardWriter(tmp_path) as writer:
        for sample in dataset:
            writer.write(sample.key, sample.image, "png", str(sample.alt), {})
    with loader(ShardDataset(tmp_path), tokenizer, batch_size=16) as stream:
        batch = next(stream)
        assert stream.captions_missing == 16
    assert torch.equal(batch.alt_ids, batch.sentence_ids)

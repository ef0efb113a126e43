"""The stream of batches is a function of (seed, position) and of nothing else."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision.data.augment import Augment
from openvision.data.loader import Batch, Loader
from openvision.data.shards import ShardDataset, ShardWriter
from openvision.errors import OpenVisionError
from openvision.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def dataset(shapes_folder) -> ShardDataset:
    return ShardDataset(shapes_folder / "train")


@pytest.fixture(scope="module")
def tokenizer(dataset) -> Tokenizer:
    return Tokenizer.train([text for sample in dataset for text in (sample.alt, sample.synthetic)], 120)


def loader(dataset, tokenizer, start=0, threads=1, seed=3, batch_size=6) -> Loader:
    return Loader(
        dataset,
        tokenizer,
        resolution=16,
        batch_size=batch_size,
        context_length=12,
        caption_length=20,
        augment=Augment(),
        seed=seed,
        start=start,
        threads=threads,
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
def test_a_stopped_stream_goes_on_at_any_position_and_thread_count(dataset, tokenizer, start, threads):
    position = 6 * (start // 6)
    whole = take(position // 6 + 2, dataset, tokenizer)
    resumed = take(2, dataset, tokenizer, start=position, threads=threads)
    assert all(same(one, other) for one, other in zip(whole[-2:], resumed, strict=True))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), batch_size=st.integers(1, 40))
def test_every_epoch_visits_every_sample_once(dataset, tokenizer, seed, batch_size):
    stream = loader(dataset, tokenizer, seed=seed, batch_size=batch_size)
    visits = [stream.sample_at(position) for position in range(3 * len(dataset))]
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
    (batch,) = take(1, dataset, tokenizer, batch_size=40)
    assert len(batch.keys) == 40
    assert set(batch.keys) == {sample.key for sample in dataset}


def spoiled(folder, dataset, bad: dict[str, tuple[bytes | None, str | None]]) -> ShardDataset:
    with ShardWriter(folder) as writer:
        for sample in dataset:
            image, text = bad.get(sample.key, (None, None))
            meta = {**sample.meta, "synthetic": sample.synthetic}
            alt = sample.alt if text is None else text
            writer.write(sample.key, sample.image if image is None else image, "png", alt, meta)
    return ShardDataset(folder)


def test_bad_samples_are_replaced_and_counted_by_reason(tmp_path, dataset, tokenizer):
    data = spoiled(tmp_path, dataset, {"red-bar": (b"no picture", None), "blue-pole": (None, "  ")})
    with loader(data, tokenizer, batch_size=16) as stream:
        batch = next(stream)
        assert stream.rejected == {"undecodable": 1, "empty_text": 1}
    assert len(batch.keys) == 16
    assert not {"red-bar", "blue-pole"} & set(batch.keys)


def test_too_many_bad_samples_end_the_run(tmp_path, dataset, tokenizer):
    data = spoiled(tmp_path, dataset, {"red-bar": (b"no picture", None)})
    with (
        loader(data, tokenizer, batch_size=64) as stream,
        pytest.raises(OpenVisionError, match=r"\d+ of \d+ samples cannot be used \(undecodable \d+\), more than 1%"),
    ):
        for _ in range(30):
            next(stream)


def test_long_texts_are_cut_and_counted(tmp_path, dataset, tokenizer):
    data = spoiled(tmp_path, dataset, {"red-bar": (None, "red bar " * 30)})
    with loader(data, tokenizer, batch_size=16) as stream:
        batch = next(stream)
        assert stream.texts_cut == 1
    (row,) = (index for index, key in enumerate(batch.keys) if key == "red-bar")
    assert batch.alt_ids[row, -2:].tolist() == [tokenizer.eos_id, tokenizer.cls_id]


def test_nothing_but_bad_samples(tmp_path, dataset, tokenizer):
    data = spoiled(tmp_path, dataset, {sample.key: (b"", None) for sample in dataset})
    with loader(data, tokenizer) as stream, pytest.raises(Exception, match="100 samples in a row cannot be used"):
        next(stream)


def test_sentences_vary_and_targets_do_not(dataset, tokenizer):
    batches = take(8, dataset, tokenizer, batch_size=16)
    sentences = {tuple(row) for batch in batches for row in batch.sentence_ids.numpy()}
    targets = {tuple(row) for batch in batches for row in batch.labels.numpy()}
    assert len(targets) == len(dataset)
    assert len(sentences) > len(dataset)
    assert np.mean([len(set(batch.keys)) for batch in batches]) == 16

"""Orders visit every sample once an epoch, whatever is asked for first."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision.data.order import BlockShuffle, GlobalShuffle, Interleaved
from openvision.errors import OpenVisionError

lengths = st.integers(1, 300)


# Grain's shuffle of few samples searches long: a second for each example.
@settings(max_examples=8, deadline=None)
@given(length=lengths, seed=st.integers(0, 2**31), block=st.integers(1, 40), window=st.integers(1, 90), epoch=lengths)
def test_blocks_visit_every_sample_once(length, seed, block, window, epoch) -> None:
    order = BlockShuffle(length, seed, block, window)
    assert sorted(order[epoch * length + place] for place in range(length)) == list(range(length))


@settings(max_examples=30, deadline=None)
@given(length=lengths, seed=st.integers(0, 2**31), epoch=lengths)
def test_the_global_order_visits_every_sample_once(length, seed, epoch) -> None:
    order = GlobalShuffle(length, seed)
    assert sorted(order[epoch * length + place] for place in range(length)) == list(range(length))


def test_epochs_and_seeds_differ() -> None:
    orders = [
        tuple(BlockShuffle(200, seed, 8, 32)[200 * epoch + place] for place in range(200))
        for seed, epoch in itertools.product((1, 2), (0, 1, 7))
    ]
    assert len(set(orders)) == 6


def test_neighbours_stay_near_and_do_not_stay_in_order() -> None:
    order = BlockShuffle(100_000, 5, block=50, window=500)
    window = [order[position] for position in range(500)]
    # A window of 500 touches ten blocks, eleven with a short one: ten or so pieces of the disk, not 500.
    assert len({sample // 50 for sample in window}) <= 11
    steps = sum(later == earlier + 1 for earlier, later in itertools.pairwise(window))
    assert steps < 25


def test_blocks_come_from_everywhere() -> None:
    order = BlockShuffle(100_000, 5, block=50, window=500)
    halves = Counter(order[position] // 50_000 for position in range(0, 100_000, 1000))
    assert min(halves[0], halves[1]) > 30


@pytest.mark.parametrize("order", [GlobalShuffle(10**9, 3), BlockShuffle(10**9, 3)], ids=["global", "blocks"])
def test_far_positions_of_a_billion_samples(order) -> None:
    places = [order[10**9 * 14 + position] for position in range(0, 10**9, 10**6)]
    assert len(set(places)) == 1000
    assert all(0 <= place < 10**9 for place in places)
    # A thousand uniform draws: the mean is within 5 standard deviations of the middle.
    assert abs(sum(places) / 1000 - 5e8) < 5 * 2.9e8 / 1000**0.5


def test_512_processes_share_ten_million_samples() -> None:
    import numpy as np

    order = BlockShuffle(10_000_000, 11, block=64, window=4096)
    batch, processes = 8192, 512
    share = batch // processes
    seen = np.zeros(10_000_000, dtype=np.uint8)
    # One process in 64 is followed through the epoch; together with the law above the rest is the same.
    for rank in range(0, processes, 64):
        for number in range(0, 10_000_000 // batch, 40):
            begin = number * batch + rank * share
            for position in range(begin, begin + share):
                seen[order[position]] += 1
    assert seen.max() == 1
    assert seen.sum() == 8 * share * len(range(0, 10_000_000 // batch, 40))


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), start=st.integers(0, 10**9))
def test_sources_come_up_by_their_weights(weights, start) -> None:
    order = Interleaved(weights)
    found = Counter(order[start + position][0] for position in range(900))
    for source, weight in enumerate(weights):
        assert abs(found[source] - 900 * weight / sum(weights)) <= len(weights) + 1


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_each_source_is_counted_without_a_gap(weights) -> None:
    order = Interleaved(weights)
    places = [order[position] for position in range(500)]
    for source in range(len(weights)):
        own = [place for number, place in places if number == source]
        assert own == list(range(len(own)))


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [float("nan"), 1]])
def test_weights_that_mean_nothing(weights) -> None:
    with pytest.raises(OpenVisionError, match="not all 0"):
        Interleaved(weights)


def test_a_block_of_nothing() -> None:
    with pytest.raises(OpenVisionError, match="must be at least 1"):
        BlockShuffle(10, 0, block=0)

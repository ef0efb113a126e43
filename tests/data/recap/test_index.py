"""Sorted runs are merged, and repeats counted, a range of digests at a time."""

import numpy as np

from openvision.data.recap.index import merge_runs, repeated, save_array


def test_runs_merge_in_bounded_pieces(tmp_path):
    rng = np.random.default_rng(0)
    runs, everything = [], []
    for number, count in enumerate((1000, 0, 300, 1)):
        digests = np.sort(rng.integers(0, 2**64, count, dtype=np.uint64) >> np.uint64(52) << np.uint64(52))
        places = np.arange(count, dtype=np.uint64) + np.uint64(number << 32)
        runs.append(tmp_path / f"{number:06d}")
        save_array(runs[-1].with_suffix(".digests.npy"), digests)
        save_array(runs[-1].with_suffix(".places.npy"), places)
        everything += zip(digests.tolist(), places.tolist(), strict=True)
    merge_runs(runs, tmp_path / "all", span=50)
    merged = [np.load(tmp_path / f"all.{part}.npy").tolist() for part in ("digests", "places")]
    assert list(zip(*merged, strict=True)) == sorted(everything)
    values, counts = np.unique([digest for digest, _ in everything], return_counts=True)
    expected = [[int(v), int(c)] for v, c in zip(values, counts, strict=True) if c >= 2]
    assert expected
    assert repeated([run.with_suffix(".digests.npy") for run in runs], 2, span=50).tolist() == expected

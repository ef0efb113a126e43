"""Shards give back what was written, at random, and notice when they were harmed."""

import pickle
import tarfile

import pytest

from openvision.data.shards import ShardDataset, ShardWriter
from openvision.errors import OpenVisionError


def write(folder, count=7, per_shard=3):
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for index in range(count):
            meta = {"synthetic": f"Caption {index}.", "name": f"näme {index}"}
            writer.write(f"key{index}", b"image" * (index + 1), "png", f"alt {index}", meta)


def test_what_is_written_is_read_in_any_order(tmp_path):
    write(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert len(dataset) == 7
    assert [path.name for path in sorted(tmp_path.glob("*.tar"))] == ["000000.tar", "000001.tar", "000002.tar"]
    for index in (6, 0, 3, 2, 5, 1, 4):
        sample = dataset[index]
        assert (sample.key, sample.alt, sample.synthetic) == (f"key{index}", f"alt {index}", f"Caption {index}.")
        assert sample.image == b"image" * (index + 1)
        assert sample.meta == {"name": f"näme {index}"}
    with pytest.raises(IndexError):
        dataset[7]
    assert not list(tmp_path.glob(".*"))


def test_it_is_an_ordinary_webdataset_tar(tmp_path):
    write(tmp_path, count=2)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert tar.getnames() == ["key0.png", "key0.txt", "key0.json", "key1.png", "key1.txt", "key1.json"]


def test_bytes_and_manifest_depend_on_the_samples_alone(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    write(tmp_path / "c", count=6)
    assert (tmp_path / "a/000000.tar").read_bytes() == (tmp_path / "b/000000.tar").read_bytes()
    a, b, c = (ShardDataset(tmp_path / name).manifest_hash() for name in "abc")
    assert a == b != c


def test_missing_index_is_built_and_the_same(tmp_path):
    write(tmp_path)
    index = tmp_path / "000001.index.json"
    content = index.read_text()
    index.unlink()
    assert ShardDataset(tmp_path)[4].alt == "alt 4"
    assert index.read_text() == content


def test_other_processes_can_have_it(tmp_path):
    write(tmp_path)
    copy = pickle.loads(pickle.dumps(ShardDataset(tmp_path)))
    assert copy[5].alt == "alt 5"


def test_another_field_as_synthetic_caption(tmp_path):
    write(tmp_path)
    sample = ShardDataset(tmp_path, synthetic_key="name")[0]
    assert sample.synthetic == "näme 0"
    assert ShardDataset(tmp_path, synthetic_key="unknown")[0].synthetic is None


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(OpenVisionError, match=r"nowhere does not exist"):
        ShardDataset(tmp_path / "nowhere")
    with pytest.raises(OpenVisionError, match=r"holds no \.tar file"):
        ShardDataset(tmp_path)


@pytest.mark.parametrize("keep", [100, 700, 1536, 2048])
def test_truncated_tar_is_named(tmp_path, keep):
    write(tmp_path, count=2)
    path = tmp_path / "000000.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OpenVisionError, match=r"000000\.tar has \d+ bytes but its index was made from"):
        ShardDataset(tmp_path)
    (tmp_path / "000000.index.json").unlink()
    with pytest.raises(OpenVisionError, match=r"000000\.tar is truncated or not a tar"):
        ShardDataset(tmp_path)


def test_tar_cut_while_in_use(tmp_path):
    write(tmp_path, count=2)
    dataset = ShardDataset(tmp_path)
    path = tmp_path / "000000.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OpenVisionError, match="ends early"):
        dataset[1]


def test_broken_index_and_broken_json(tmp_path):
    write(tmp_path, count=1)
    (tmp_path / "000000.index.json").write_text("{")
    with pytest.raises(OpenVisionError, match="remove it and it is built anew"):
        ShardDataset(tmp_path)


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), ShardWriter(tmp_path) as writer:
        writer.write("a", b"x", "png", "alt", {})
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_keys_that_would_break_the_layout(tmp_path):
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="without"):
            writer.write("a.b", b"", "png", "", {})
        writer.write("ok", b"x", "png", "alt", {})

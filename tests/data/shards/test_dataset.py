"""Shards return what was written, in any order, and damage is noticed."""

import io
import pickle
import shutil
import tarfile

import pytest

from openvision.data.shards.dataset import ShardDataset, ShardWriter, all_texts, unpack_images
from openvision.data.shards.manifest import index_folder
from openvision.data.shards.store import LocalStore
from openvision.errors import OpenVisionError
from openvision.images.decode import BadSampleError


def foreign_tar(path, members: list[tuple[str, bytes]]) -> None:
    """A tar as another program writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


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
    index = tmp_path / "000001.index"
    content = index.read_bytes()
    index.unlink()
    assert ShardDataset(tmp_path)[4].alt == "alt 4"
    assert index.read_bytes() == content


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
    with pytest.raises(OpenVisionError, match=r"000000\.tar has \d+ bytes but its index was built from"):
        ShardDataset(tmp_path)
    (tmp_path / "000000.index").unlink()
    (tmp_path / "shards.json").unlink()
    with pytest.raises(OpenVisionError, match=r"000000\.tar is truncated or not a tar"):
        ShardDataset(tmp_path)


def test_tar_cut_while_in_use(tmp_path):
    write(tmp_path, count=2)
    dataset = ShardDataset(tmp_path)
    path = tmp_path / "000000.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OpenVisionError, match="ends early"):
        dataset[1]


def test_another_tar_of_the_same_size_is_noticed(tmp_path):
    write(tmp_path / "a", count=2)
    with ShardWriter(tmp_path / "b") as writer:
        for key in ("one", "two"):
            writer.write(key, b"other", "png", "alt", {})
    # Tars are padded to blocks: the sizes are equal though the contents are not.
    assert (tmp_path / "a/000000.tar").stat().st_size == (tmp_path / "b/000000.tar").stat().st_size
    shutil.copy(tmp_path / "b/000000.tar", tmp_path / "a/000000.tar")
    with pytest.raises(OpenVisionError, match=r"000000\.tar: key0\.\w+ does not match its index"):
        ShardDataset(tmp_path / "a")[0]


def test_a_vanished_tar_is_named(tmp_path):
    write(tmp_path, count=1)
    dataset = ShardDataset(tmp_path)
    (tmp_path / "000000.tar").unlink()
    with pytest.raises(OpenVisionError, match=r"000000\.tar cannot be read"):
        dataset[0]


def test_folders_inside_a_tar_are_part_of_the_key(tmp_path):
    members = [(f"{place}1.{kind}", place.encode()) for place in ("./", "x/", "y/") for kind in ("png", "txt")]
    foreign_tar(tmp_path / "0.tar", members)
    pairs = [(sample.key, sample.alt) for sample in ShardDataset(tmp_path)]
    assert pairs == [("1", "./"), ("x/1", "x/"), ("y/1", "y/")]


def test_a_repeated_key_is_counted_and_the_first_stays(tmp_path):
    foreign_tar(tmp_path / "foreign/0.tar", [("a.png", b"1"), ("a.txt", b"1"), ("a.png", b"2"), ("a.txt", b"2")])
    dataset = ShardDataset(tmp_path / "foreign")
    assert dataset.rejected == {"duplicate_key": 2}
    assert (len(dataset), dataset[0].image) == (1, b"1")
    with pytest.raises(OpenVisionError, match="'a' is written twice"), ShardWriter(tmp_path / "ours", 1) as writer:
        for _ in range(2):
            writer.write("a", b"1", "png", "alt", {})
    assert len(ShardDataset(tmp_path / "ours")) == 1


def test_a_key_of_an_earlier_shard_is_a_bad_sample(tmp_path):
    for number, keys in enumerate(("ab", "bc")):
        members = [(f"{key}.{kind}", f"{key}{number}".encode()) for key in keys for kind in ("png", "txt")]
        foreign_tar(tmp_path / f"{number}.tar", members)
    dataset = ShardDataset(tmp_path)
    assert dataset.rejected == {"duplicate_key": 1}
    assert [dataset[index].alt for index in (0, 1, 3)] == ["a0", "b0", "c1"]
    with pytest.raises(BadSampleError, match="holds the key b too"):
        dataset[2]


def test_members_without_a_image_are_counted(tmp_path):
    foreign_tar(tmp_path / "0.tar", [("a.txt", b"alone"), ("b.png", b"1"), ("b.txt", b"two")])
    dataset = ShardDataset(tmp_path)
    assert dataset.rejected == {"no_image": 1}
    assert [sample.key for sample in dataset] == ["b"]
    # Earlier versions stored the reason under another name; the index keeps it, and with it the identity of the data.
    assert b"no_picture" in (tmp_path / "0.index").read_bytes()
    manifest = tmp_path / "shards.json"
    manifest.write_text(manifest.read_text().replace("no_image", "no_picture"))
    assert ShardDataset(tmp_path).rejected == {"no_image": 1}


def test_captions_beside_a_shard(tmp_path):
    foreign_tar(tmp_path / "0.tar", [("a.jpg", b"1"), ("a.txt", b"web"), ("b.jpg", b"2"), ("b.txt", b"b web")])
    assert ShardDataset(tmp_path)[0].synthetic is None
    captions = [("a.json", b'{"re_caption": "A cat. It sits."}'), ("z.json", b'{"re_caption": "nobody"}')]
    foreign_tar(tmp_path / "0.captions.tar", captions)
    dataset = ShardDataset(tmp_path, synthetic_key="re_caption")
    assert [sample.synthetic for sample in dataset] == ["A cat. It sits.", None]
    assert dataset.rejected == {"caption_without_sample": 1}
    assert dataset.caption_names() == ["re_caption", "txt"]
    swapped = ShardDataset(tmp_path, synthetic_key="txt", alt_key="re_caption")[0]
    assert (swapped.alt, swapped.synthetic) == ("A cat. It sits.", "web")


def test_unknown_captions_are_refused_with_the_known_ones(tmp_path):
    write(tmp_path)
    dataset = ShardDataset(tmp_path)
    dataset.require_captions("txt", "synthetic")
    with pytest.raises(OpenVisionError, match=r"no captions named 'synthetik'; known are name, synthetic, txt"):
        dataset.require_captions("synthetik")


def test_a_tar_written_after_its_index(tmp_path):
    write(tmp_path / "a", count=2)
    write(tmp_path / "b", count=2)
    other = (tmp_path / "b/000000.tar").read_bytes().replace(b"alt 0", b"alt 9")
    (tmp_path / "a/shards.json").unlink()
    # Copied again, with a new time and the same members: nothing is wrong.
    shutil.copyfile(tmp_path / "b/000000.tar", tmp_path / "a/000000.tar")
    assert ShardDataset(tmp_path / "a")[0].alt == "alt 0"
    (tmp_path / "a/shards.json").unlink()
    (tmp_path / "a/000000.tar").write_bytes(other)
    with pytest.raises(OpenVisionError, match=r"key0\.txt does not match its index"):
        ShardDataset(tmp_path / "a")


def test_a_vanished_shard_is_named_on_opening(tmp_path):
    write(tmp_path)
    (tmp_path / "000001.tar").unlink()
    with pytest.raises(OpenVisionError, match=r"000001\.tar is in shards\.json but no longer exists"):
        ShardDataset(tmp_path)
    index_folder(LocalStore(tmp_path), rebuild=True)
    assert len(ShardDataset(tmp_path)) == 4


def test_broken_index_and_broken_manifest(tmp_path):
    write(tmp_path, count=1)
    (tmp_path / "000000.index").write_bytes(b"{")
    with pytest.raises(OpenVisionError, match=r"000000\.index cannot be read .*--rebuild"):
        ShardDataset(tmp_path)[0]
    (tmp_path / "shards.json").write_text("{")
    with pytest.raises(OpenVisionError, match=r"shards\.json cannot be read"):
        ShardDataset(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_broken_json_is_a_bad_sample(tmp_path, content):
    good = [("b.png", b"2"), ("b.txt", b"two"), ("b.json", b"{}")]
    foreign_tar(tmp_path / "0.tar", [("a.png", b"1"), ("a.txt", b"one"), ("a.json", content), *good])
    dataset = ShardDataset(tmp_path)
    with pytest.raises(BadSampleError, match=r"a\.json"):
        dataset[0]
    assert list(all_texts(dataset)) == ["two"]


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), ShardWriter(tmp_path) as writer:
        writer.write("a", b"x", "png", "alt", {})
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_a_writer_does_not_mix_with_older_shards(tmp_path):
    write(tmp_path)
    with pytest.raises(OpenVisionError, match="already holds shards"):
        ShardWriter(tmp_path)


def test_keys_that_would_break_the_layout(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for key in ("", "a.b", "a/b"):
            with pytest.raises(OpenVisionError, match="without"):
                writer.write(key, b"", "png", "", {})
        with pytest.raises(OpenVisionError, match="too long"):
            writer.write("k" * 96, b"", "png", "", {})
        writer.write("k" * 95, b"x", "png", "alt", {})
        writer.write("ok", b"x", "png", "alt", {})


def test_images_are_unpacked_under_their_names(tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        for key, name in (("k1", "a red car"), ("k2", "a red car"), ("k3", "../x/..")):
            writer.write(key, key.encode(), "webp", "alt", {"name": name})
        writer.write("k4", b"k4", "jpg", "alt", {})
    folder = tmp_path / "images"
    assert unpack_images(ShardDataset(tmp_path / "shards"), folder) == 4
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert written == {"a-red-car.webp": b"k1", "a-red-car-k2.webp": b"k2", "x.webp": b"k3", "k4.jpg": b"k4"}

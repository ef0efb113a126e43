"""Shards behind URLs: the same samples, and retries after network failures."""

import pickle
from pathlib import Path

import fsspec
import pytest

from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.data.shards.manifest import index_folder
from openvision.data.shards.store import LocalStore, RemoteStore, join_folder, open_store
from openvision.errors import OpenVisionError


@pytest.fixture
def remote(tmp_path):
    """Two shards in fsspec's memory, not indexed."""
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for index in range(3):
            writer.write(f"key{index}", b"image" * (index + 1), "png", f"alt {index}", {"synthetic": "Caption."})
    files = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        files.pipe_file(f"/bucket/data/{path.name}", path.read_bytes())
    yield "memory://bucket/data"
    files.rm("/bucket", recursive=True)


def test_a_remote_folder_is_indexed_once_and_read_at_random(remote, tmp_path) -> None:
    with pytest.raises(OpenVisionError, match=r"has no index; build it once with `openvision data index memory://"):
        ShardDataset(remote)
    index_folder(open_store(remote))
    dataset, local = ShardDataset(remote), ShardDataset(tmp_path)
    assert [dataset[index] for index in (2, 0, 1)] == [local[index] for index in (2, 0, 1)]
    assert dataset.manifest_hash() == local.manifest_hash()
    assert pickle.loads(pickle.dumps(dataset))[1] == local[1]


class Flaky:
    """A file system that fails a given number of times."""

    def __init__(self, failures: int) -> None:
        self.left = failures

    def cat_file(self, path: str, start: int, end: int | None) -> bytes:
        if self.left:
            self.left -= 1
            raise ConnectionResetError("the peer hung up")
        return b"0123456789"[start:end]


def flaky_store(failures: int) -> tuple[RemoteStore, list[float]]:
    slept: list[float] = []
    store = RemoteStore("memory://bucket", pauses=(1.0, 2.0, 4.0), sleep=slept.append)
    vars(store)["_files"] = Flaky(failures)
    return store, slept


def test_network_failures_are_retried() -> None:
    store, slept = flaky_store(failures=2)
    assert store.read("a.tar", 2, 3) == b"234"
    assert slept == [1.0, 2.0]


def test_a_permanent_failure_is_one_sentence() -> None:
    store, slept = flaky_store(failures=100)
    with pytest.raises(
        OpenVisionError, match=r"memory://bucket/a\.tar cannot be read or written after 4 attempts: the peer"
    ):
        store.read("a.tar")
    assert slept == [1.0, 2.0, 4.0]


def test_an_unknown_scheme() -> None:
    with pytest.raises(OpenVisionError, match="nowhere://bucket cannot be opened"):
        open_store("nowhere://bucket")


def test_folders_are_joined_as_their_kind_wants(tmp_path) -> None:
    assert join_folder(Path("data"), "train") == Path("data/train")
    assert join_folder("s3://bucket/data/", "train") == "s3://bucket/data/train"
    assert join_folder(Path("data"), "s3://other/train") == "s3://other/train"
    assert join_folder("data", str(tmp_path)) == tmp_path
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)


def test_a_file_that_is_no_shard_is_called_so(tmp_path):
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(OpenVisionError, match=r"table\.csv is a file and no shard; name a folder of shards"):
        open_store(tmp_path / "table.csv")

"""Tars: a damaged header is said, never taken for the end, and odd members stay out."""

import io
import tarfile

import pytest

from openvision.data.shards.dataset import ShardDataset
from openvision.data.shards.store import LocalStore
from openvision.data.shards.tar import check_whole
from openvision.data.tools.verify import verify
from openvision.errors import OpenVisionError
from tests.data.strangers import good, write_tar


def header_of(path, number: int) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[number].offset


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (bytes(range(256)) * 2, "the header is damaged"),
        (bytes(512), "a block of zeros"),
        (bytes(1024), "a block of zeros"),
    ],
)
def test_a_damaged_header_is_said_with_what_lies_behind_it(tmp_path, damage, said, indexed):
    path = write_tar(tmp_path, good(10))
    if indexed:
        # An index from before the damage.
        assert len(ShardDataset(tmp_path)) == 10
    at = header_of(path, 15)
    data = bytearray(path.read_bytes())
    data[at : at + len(damage)] = damage
    path.write_bytes(data)
    with pytest.raises(OpenVisionError, match=f"{said}.* at byte {at}, but .* 14 readable members follow"):
        check_whole(LocalStore(tmp_path), path.name)
    result = verify(tmp_path)
    assert result.reasons == {"broken_shard": 1}
    assert f"at byte {at}" in result.findings[0].detail
    if not indexed:
        with pytest.raises(OpenVisionError, match="14 readable members"):
            ShardDataset(tmp_path)


def test_a_tar_behind_a_tar_is_said(tmp_path):
    path = write_tar(tmp_path, good(3))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(OpenVisionError, match="9 readable members follow"):
        ShardDataset(tmp_path)


def test_zeros_behind_the_end_are_no_loss(tmp_path):
    path = write_tar(tmp_path, good(3))
    path.write_bytes(path.read_bytes() + bytes(3_000_000))
    assert len(ShardDataset(tmp_path)) == 3


def test_a_size_that_leads_back_is_no_endless_loop(tmp_path):
    path = write_tar(tmp_path, good(2))
    at = header_of(path, 3)
    data = bytearray(path.read_bytes())
    # Base 256, negative: tarfile of Python 3.11 would seek back to the same header.
    data[at + 124 : at + 136] = (-1024).to_bytes(12, "big", signed=True)
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    with pytest.raises(OpenVisionError, match="truncated or not a tar"):
        ShardDataset(tmp_path)


def test_a_sparse_file_of_terabytes_is_no_member(tmp_path):
    path = tmp_path / "000000.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in good(1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("huge.png")
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1"}
        info.pax_headers |= {"GNU.sparse.size": str(2**42), "GNU.sparse.name": "huge.png"}
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    dataset = ShardDataset(tmp_path)
    assert [sample.key for sample in dataset] == ["g000"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("caf\udce9.png", "bad_name"),
        ("folder/._x.png", "bad_name"),
        ("anim.gif", "unsupported_image"),
        ("x.heic", "unsupported_image"),
        ("y.txt", "no_image"),
    ],
)
def test_members_that_are_no_sample_are_counted_by_reason(tmp_path, name, reason):
    write_tar(tmp_path, [*good(2), (name, b"data")])
    dataset = ShardDataset(tmp_path)
    assert (len(dataset), dataset.left_out) == (2, {reason: 1})
    assert verify(tmp_path).reasons == {reason: 1}


def test_a_member_named_like_the_captions_is_not_read_from_the_captions_tar(tmp_path):
    write_tar(tmp_path, [*good(1), ("g000.captions", b"{}")])
    dataset = ShardDataset(tmp_path)
    assert dataset.left_out == {"bad_name": 1}
    assert dataset[0].key == "g000"

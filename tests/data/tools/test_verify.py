"""Everything that is wrong with shards is found, and what is right beside it is still read."""

import io
import json
import tarfile

import pytest
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.data.tools.verify import shards_of, verify
from openvision.errors import OpenVisionError
from tests.conftest import draw


def write(folder, count=6, per_shard=2, **changed):
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for index in range(count):
            image = changed.get(f"image{index}", draw("red", "bar"))
            writer.write(f"key{index}", image, "png", changed.get(f"text{index}", "a red bar"), {"synthetic": "x."})
    return folder


def found(folder) -> list[tuple[str, str, str | None]]:
    return [(finding.reason, finding.shard, finding.key) for finding in verify(folder).findings]


def test_good_shards(tmp_path):
    result = verify(write(tmp_path / "shards"))
    assert (result.shards, result.samples, result.findings) == (3, 6, [])


def test_every_bad_sample_is_found_by_reason(tmp_path):
    folder = write(tmp_path / "shards", image1=b"not an image", text4="  ", image5=draw("red", "bar")[:60])
    assert found(folder) == [
        ("undecodable", "000000.tar", "key1"),
        ("empty_text", "000002.tar", "key4"),
        ("undecodable", "000002.tar", "key5"),
    ]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_cut_shard_is_one_finding_and_the_others_are_read(tmp_path, indexed):
    folder = write(tmp_path / "shards")
    path = folder / "000001.tar"
    path.write_bytes(path.read_bytes()[:1500])
    if not indexed:
        for file in folder.iterdir():
            if file.suffix != ".tar":
                file.unlink()
    before = sorted(file.name for file in folder.iterdir())
    result = verify(folder)
    (finding,) = result.findings
    assert (finding.reason, finding.shard, finding.key) == ("broken_shard", "000001.tar", None)
    assert str(path) in finding.detail
    assert (result.shards, result.samples) == (3, 4)
    assert sorted(file.name for file in folder.iterdir()) == before


def test_a_flipped_bit_is_found_also_where_the_image_still_decodes(tmp_path):
    folder = write(tmp_path / "shards")
    path = folder / "000002.tar"
    data = bytearray(path.read_bytes())
    place = data.rindex(b"a red bar")
    data[place] ^= 1
    path.write_bytes(data)
    assert found(folder) == [("damaged", "000002.tar", "key5")]


def test_a_key_in_two_shards(tmp_path):
    folder = write(tmp_path / "shards", count=2)
    (folder / "000001.tar").write_bytes((folder / "000000.tar").read_bytes())
    (folder / "shards.json").unlink(missing_ok=True)
    assert found(folder) == [("duplicate_key", "000001.tar", "key0"), ("duplicate_key", "000001.tar", "key1")]


def test_broken_json(tmp_path):
    members = {"a.png": draw("red", "bar"), "a.txt": b"text", "a.json": b"{"}
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert found(tmp_path / "shards") == [("bad_json", "0.tar", "a")]


def test_tars_of_further_captions_are_no_shards(tmp_path):
    for name in ("0.tar", "0.captions.tar", "part.1.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in shards_of(tmp_path)] == ["0.tar", "part.1.tar"]
    with pytest.raises(OpenVisionError, match=r"nowhere does not exist"):
        shards_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpenVisionError, match=r"holds no \.tar file"):
        shards_of(tmp_path / "empty")


def test_an_index_that_changed_behind_its_manifest(tmp_path):
    """The others believe the manifest and fail at the index: what is built again in a copy says nothing of it."""
    write(tmp_path)
    ShardDataset(tmp_path)
    index = tmp_path / "000001.index"
    data = index.read_bytes()
    old, new = rb"\"captions_bytes\": null", rb"\"captions_bytes\": 3333"
    assert data.count(old) == 1
    index.write_bytes(data.replace(old, new))
    (finding,) = verify(tmp_path).findings
    assert (finding.reason, finding.shard) == ("broken_manifest", "000001.tar")
    assert "its index is not the one that the manifest was made of; rebuild both" in finding.detail
    # Without a manifest the index is built again.
    (tmp_path / "shards.json").unlink()
    assert found(tmp_path) == []


def test_progress_ends_with_everything(tmp_path):
    told = []
    verify(write(tmp_path / "shards"), progress=lambda done, share: told.append((done, share)))
    assert [done for done, _ in told] == [1, 2, 3, 4, 5, 6]
    assert [share for _, share in told] == sorted(share for _, share in told)
    assert told[-1] == (6, pytest.approx(1))


def test_the_command(tmp_path):
    good, bad = write(tmp_path / "good"), write(tmp_path / "bad", image1=b"not an image")
    assert len(ShardDataset(bad)) == 6
    result = CliRunner().invoke(app, ["data", "verify", str(good)])
    assert (result.exit_code, "6 samples in 3 shards: all good" in result.output) == (0, True)
    rejects = tmp_path / "rejects.jsonl"
    result = CliRunner().invoke(app, ["data", "verify", str(bad), "--rejects", str(rejects)])
    assert result.exit_code == 1
    assert "undecodable: 1" in result.output
    (line,) = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert (line["reason"], line["shard"], line["key"]) == ("undecodable", "000000.tar", "key1")

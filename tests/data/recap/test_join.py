"""A thousand rows in the columns of the release, joined with what img2dataset would have left of them."""

import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.recap.join import RecapOptions, recap
from openvision.data.recap.report import make_report
from openvision.data.shards.dataset import ShardDataset
from openvision.data.shards.store import LocalStore
from openvision.errors import OpenVisionError
from tests.data.recap.release import PLACEHOLDER, row, sha, write_shards, write_table

OPTIONS = RecapOptions(group_shards=3)


@pytest.fixture
def shards(tmp_path) -> Path:
    write_shards(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def table(tmp_path) -> Path:
    write_table(tmp_path / "table", [row(number) for number in range(1000)])
    return tmp_path / "table"


@pytest.fixture
def small_units(monkeypatch):
    """Several units a file, as the release has."""
    monkeypatch.setattr("openvision.data.recap.table._UNIT_ROWS", 200)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def test_by_hash(shards, table, small_units):
    steps = []
    report = recap(shards, table, OPTIONS, progress=lambda *step: steps.append(step))
    assert [step for step in steps if step[1] == step[2]] == [("index", 4, 4), ("scan", 5, 5), ("join", 4, 4)]
    assert report["samples"]["total"] == 925
    assert report["samples"]["joined"] == 798
    assert report["samples"]["join_rate"] == pytest.approx(798 / 925)
    assert nonzero(report["samples"]["dropped"]) == {"no_row": 92, "placeholder": 30, "differing_captions": 5}
    assert report["samples"]["examples"]["differing_captions"] == [f"moved{number}" for number in range(990, 1000, 2)]
    assert report["rows"]["total"] == 1000
    assert report["rows"]["on_disk"] == 828
    dropped = {"not_on_disk": 100, "no_join_value": 2, "empty_caption": 40, "placeholder": 30}
    assert report["rows"]["dropped"] == dropped
    assert report["rows"]["examples"] == {"not_on_disk": [row(number)["url"] for number in range(800, 805)]}
    assert report["captions_mended"] == 2
    for place in ("on_disk", "in_table"):
        most = [{"sha256_begins": "e" * 16, "copies": 30}]
        assert report["placeholders"][place] == {"images": 1, "copies": 30, "most_copied": most}
    assert report["download"] == {"count": 1200, "successes": 1000, "failed_to_download": 180, "failed_to_resize": 20}


def test_by_url(shards, table, small_units):
    report = recap(shards, table, replace(OPTIONS, by="url"))
    assert report["samples"]["joined"] == 800
    assert nonzero(report["samples"]["dropped"]) == {"no_row": 95, "placeholder": 30}
    assert nonzero(report["rows"]["dropped"]) == {"not_on_disk": 130, "empty_caption": 40}


def test_by_key_other_images_are_refused(shards, table, small_units):
    report = recap(shards, table, replace(OPTIONS, by="key"))
    assert report["samples"]["joined"] == 800
    assert nonzero(report["samples"]["dropped"]) == {"no_row": 45, "placeholder": 30, "another_image": 50}
    assert report["samples"]["examples"]["another_image"][0] == f"{800:012d}"
    assert nonzero(report["rows"]["dropped"]) == {"not_on_disk": 80, "empty_caption": 40}


def test_sidecars_are_read_as_captions(shards, tmp_path):
    # Backwards: the rows of other pages of a image come first.
    write_table(tmp_path / "table", [row(number) for number in reversed(range(1000))])
    tars = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
    # An index from before the captions were there.
    assert ShardDataset(shards, synthetic_key="re_caption")[0].synthetic is None
    recap(shards, tmp_path / "table", OPTIONS)
    assert {name: (shards / name).read_bytes() for name in tars} == tars
    assert not (shards / ".recap").exists()
    dataset = ShardDataset(shards, synthetic_key="re_caption")
    assert len(dataset) == 925
    for index in (0, 7, 19, 797):
        sample = dataset[index]
        # Of two rows for the images 0 to 19 the one with the sample's own url was taken.
        assert (sample.alt, sample.meta["org_caption"]) == (f"alt {index}", f"alt {index}")
        assert sample.synthetic == f"A long caption of image {index}."
    assert dataset[5].synthetic == "A bottle of CLR®."
    assert dataset[6].synthetic == "The café is open."
    assert [dataset[index].synthetic for index in (798, 800, 840, 870, 875)] == [None] * 5


def test_new_shards(shards, table, tmp_path):
    output = tmp_path / "output"
    report = recap(shards, table, replace(OPTIONS, output=output, captions=(("re_caption", "synthetic"),)))
    dataset = ShardDataset(output)
    assert len(dataset) == report["samples"]["joined"] == 798
    sample = dataset[797]
    assert (sample.key, sample.image, sample.extension) == (f"{797:012d}", f"image {797:012d}".encode(), "jpg")
    assert (sample.alt, sample.synthetic) == ("alt 797", "A long caption of image 797.")
    assert sample.meta["url"] == row(797)["url"]
    assert "org_caption" not in sample.meta
    # The last two shards hold nothing that joined.
    assert [path.name for path in sorted(output.glob("*.tar"))] == [f"{number:06d}.tar" for number in range(8)]
    assert not list(output.glob(".*"))
    assert not list(shards.glob("*.captions.tar"))


def test_some_shards_alone(shards, table):
    source = f"{shards}/{{000001..000002}}.tar"
    assert recap(source, table, OPTIONS)["samples"]["joined"] == 200
    assert [path.name for path in sorted(shards.glob("*.captions.tar"))] == [
        "000001.captions.tar",
        "000002.captions.tar",
    ]
    assert not [path for path in shards.iterdir() if path.is_dir()]


def test_shards_of_several_folders_become_one_folder(shards, table, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (shards / "000001.tar").rename(tmp_path / "a/0.tar")
    (shards / "000002.tar").rename(tmp_path / "b/0.tar")
    output = tmp_path / "output"
    recap(f"{tmp_path}/a/0.tar::{tmp_path}/b/0.tar", table, replace(OPTIONS, output=output))
    assert [path.name for path in sorted(output.glob("*.tar"))] == ["a-0.tar", "b-0.tar"]
    assert len(ShardDataset(output)) == 200
    (tmp_path / "a-0.tar").write_bytes((tmp_path / "a/0.tar").read_bytes())
    both = f"{tmp_path}/a/0.tar::{tmp_path}/a-0.tar"
    with pytest.raises(OpenVisionError, match=r"a-0\.tar and a/0\.tar would both be a-0\.tar"):
        recap(both, table, replace(OPTIONS, output=tmp_path / "other"))


@pytest.mark.parametrize("mode", [pytest.param("sidecar", marks=pytest.mark.slow), "shards"])
def test_bytes_depend_on_the_inputs_alone(shards, table, tmp_path, monkeypatch, mode):
    def written(name: str, **options) -> dict[str, bytes]:
        for path in (*shards.glob("*.captions.tar"), *shards.glob("*.index")):
            path.unlink()
        folder = tmp_path / name
        recap(shards, table, replace(OPTIONS, output=folder if mode == "shards" else None, **options))
        return contents(folder if mode == "shards" else shards)

    once = written("one")
    monkeypatch.setattr("openvision.data.recap.table._UNIT_ROWS", 100)
    assert written("two", group_shards=1) == once
    assert written("three", processes=2) == once


KILLED = """
import os, sys
import openvision.data.recap.join as main, openvision.data.recap.write as write
from pathlib import Path
from openvision.data.recap.join import RecapOptions
module, name, calls = {"main": main, "write": write}[sys.argv[1]], sys.argv[2], int(sys.argv[3])
real = getattr(module, name)
def dying(*arguments):
    global calls
    calls -= 1
    if not calls:
        os._exit(9)
    return real(*arguments)
setattr(module, name, dying)
output = Path(sys.argv[6]) if len(sys.argv) > 6 else None
main.recap(sys.argv[4], Path(sys.argv[5]), RecapOptions(output=output, group_shards=3))
"""


def kill(module: str, name: str, call: int, *paths: Path) -> None:
    """Run the join in a process that ends without a word at the given call."""
    command = [sys.executable, "-c", KILLED, module, name, str(call), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        pytest.param("main", "index_group", 3, marks=pytest.mark.slow),
        ("main", "merge_runs", 1),
        pytest.param("main", "scan_unit", 2, marks=pytest.mark.slow),
        ("write", "atomic_write_text", 2),
    ],
)
def test_a_killed_join_goes_on(shards, table, tmp_path, module, name, call):
    expected = recap(shards, table, replace(OPTIONS, output=tmp_path / "whole"))
    kill(module, name, call, shards, table, tmp_path / "killed")
    report = recap(shards, table, replace(OPTIONS, output=tmp_path / "killed"))
    assert report == expected
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*"))


def test_shards_that_an_earlier_version_joined_are_counted(shards, tmp_path):
    counts = {"counts": {"samples": 3, "another_picture": 2}, "examples": {"another_picture": ["a", "b"]}}
    (tmp_path / "old.json").write_text(json.dumps(counts))
    (tmp_path / "new.json").write_text(json.dumps(counts).replace("another_picture", "another_image"))
    none = np.zeros((0, 2), dtype=np.uint64)
    report = make_report([tmp_path / "old.json", tmp_path / "new.json"], [], none, none, 10, LocalStore(shards))
    assert nonzero(report["samples"]["dropped"]) == {"another_image": 4}
    assert report["samples"]["examples"] == {"another_image": ["a", "b", "a", "b"]}


@pytest.mark.parametrize("mode", ["sidecar", pytest.param("shards", marks=pytest.mark.slow)])
def test_finished_shards_are_not_redone(shards, table, tmp_path, monkeypatch, mode):
    output = tmp_path / "output" if mode == "shards" else None
    kill("main", "write_shard", 5, shards, table, *([output] if output else []))
    redone = []
    from openvision.data.recap import join as module

    real = module.write_shard
    monkeypatch.setattr(module, "write_shard", lambda *arguments: (redone.append(arguments[2]), real(*arguments)))
    report = recap(shards, table, replace(OPTIONS, output=output))
    assert redone == [f"{number:06d}.tar" for number in range(4, 10)]
    assert report["samples"]["joined"] == 798


def test_dry_run_writes_nothing(shards, table, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (*shards.iterdir(), shards)}
    dry = recap(shards, table, replace(OPTIONS, dry_run=True))
    assert {path: path.stat().st_mtime_ns for path in (*shards.iterdir(), shards)} == before
    planned = recap(shards, table, replace(OPTIONS, dry_run=True, output=tmp_path / "output"))
    assert not (tmp_path / "output").exists()
    assert dry == planned == recap(shards, table, OPTIONS) | {"mode": "dry-run"}


def test_a_kept_work_folder_saves_the_scan(shards, table, tmp_path, monkeypatch):
    options = replace(OPTIONS, work=tmp_path / "work", dry_run=True)
    dry = recap(shards, table, options)
    monkeypatch.delattr("openvision.data.recap.table._read")
    real = recap(shards, table, replace(options, dry_run=False, output=tmp_path / "output"))
    assert real["samples"] == dry["samples"]
    assert len(ShardDataset(tmp_path / "output")) == 798


def test_a_second_table_adds_its_captions(shards, table, tmp_path):
    recap(shards, table, OPTIONS)
    rows = [{"sha256": row(number)["sha256"], "conditioned": f"Second {number}."} for number in range(3)]
    rows.append({"sha256": row(899)["sha256"], "conditioned": "Of a dead link."})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "v2.parquet")
    for _ in range(2):
        recap(shards, tmp_path / "v2.parquet", replace(OPTIONS, captions=(("conditioned", "v2"),)))
        dataset = ShardDataset(shards, synthetic_key="v2")
        assert [dataset[index].synthetic for index in (0, 2, 3)] == ["Second 0.", "Second 2.", None]
        assert dataset[2].meta["re_caption"] == "A long caption of image 2."
    # The first table once more with fewer rows: its own captions go where they joined no more, the others stay.
    write_table(tmp_path / "less", [row(number) for number in range(1, 1000)])
    recap(shards, tmp_path / "less", OPTIONS)
    dataset = ShardDataset(shards, synthetic_key="re_caption")
    # Image 0 is also that of row 970.
    assert (dataset[0].meta["org_caption"], dataset[0].meta["v2"]) == ("alt 970", "Second 0.")


def test_shards_behind_a_url(shards, table, tmp_path):
    files = fsspec.filesystem("memory")
    url = "memory://recap/shards"
    files.put(str(shards), url, recursive=True)
    with pytest.raises(OpenVisionError, match=r"memory://recap/shards is not a local folder; name a folder .* --work"):
        recap(url, table, OPTIONS)
    there = recap(url, table, replace(OPTIONS, work=tmp_path / "work"))
    here = recap(shards, table, OPTIONS)
    assert there == here | {"shards": url}
    for sidecar in shards.glob("*.captions.tar"):
        assert files.cat_file(f"/recap/shards/{sidecar.name}") == sidecar.read_bytes()
    files.rm("/recap", recursive=True)


def test_the_threshold_of_placeholder_images(shards, table):
    report = recap(shards, table, replace(OPTIONS, placeholders=31))
    assert report["placeholders"]["on_disk"]["images"] == report["placeholders"]["in_table"]["images"] == 0
    # Each of the thirty samples has thirty rows; its url says which is its own.
    assert report["samples"]["joined"] == 828
    assert recap(shards, table, replace(OPTIONS, placeholders=2))["placeholders"]["in_table"]["images"] == 26


def test_an_placeholder_image_in_the_table_alone(shards, tmp_path):
    # Today the addresses give images; when they were captioned all gave the same placeholder image.
    write_table(tmp_path / "table", [row(number) | {"sha256": PLACEHOLDER} for number in range(601)])
    report = recap(shards, tmp_path / "table", replace(OPTIONS, by="url"))
    assert report["samples"]["joined"] == 0
    assert nonzero(report["samples"]["dropped"]) == {"placeholder": 631, "no_row": 294}


def test_without_notes_of_hashes_the_images_are_hashed(tmp_path):
    write_shards(tmp_path / "shards", count=0)
    with tarfile.open(tmp_path / "shards/000000.tar", "w") as tar:
        members = [
            ("a.png", b"one"),
            ("a.json", b"{}"),
            ("b.png", b"two"),
            ("b.json", b"["),
            ("c.txt", b"not an image"),
        ]
        for name, data in [*members, ("d.webp", b"two"), ("a.jpg", b"again")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = [{"sha256": sha(text).upper(), "re_caption": text, "org_caption": None} for text in ("one", "two", "again")]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    report = recap(tmp_path / "shards", tmp_path / "table.parquet", OPTIONS)
    assert (report["samples"]["total"], report["samples"]["joined"]) == (4, 2)
    assert nonzero(report["samples"]["dropped"]) == {"bad_json": 1, "duplicate_key": 1}
    with tarfile.open(tmp_path / "shards/000000.captions.tar") as tar:
        assert tar.getnames() == ["a.json", "d.json"]
    assert report["download"] is None


def test_what_is_missing_is_named(shards, table, tmp_path):
    with pytest.raises(OpenVisionError, match=r"table .*nowhere does not exist"):
        recap(shards, tmp_path / "nowhere", OPTIONS)
    with pytest.raises(OpenVisionError, match=r"shard folder .*nowhere does not exist"):
        recap(tmp_path / "nowhere", table, OPTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpenVisionError, match=r"empty holds no \.parquet file"):
        recap(shards, tmp_path / "empty", OPTIONS)
    with pytest.raises(OpenVisionError, match=r"empty holds no \.tar file"):
        recap(tmp_path / "empty", table, OPTIONS)
    with pytest.raises(OpenVisionError, match=r"000000\.parquet has no column 'sha256'; its columns are url, status"):
        recap(shards, shards, OPTIONS)
    with pytest.raises(OpenVisionError, match=r"no column 'v2'; its columns are url, re_caption, org_caption, sha256"):
        recap(shards, table, replace(OPTIONS, captions=(("v2", "v2"),)))
    (tmp_path / "empty/a.parquet").write_bytes(b"not parquet")
    with pytest.raises(OpenVisionError, match=r"a\.parquet is not a parquet file"):
        recap(shards, tmp_path / "empty", OPTIONS)
    parquet.write_table(pa.Table.from_pylist([row(0)]).slice(0, 0), tmp_path / "empty/a.parquet")
    with pytest.raises(OpenVisionError, match="holds no row"):
        recap(shards, tmp_path / "empty", OPTIONS)
    assert not (shards / ".recap").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "sha"}, "unknown join key 'sha'; use one of hash, key, url"),
        ({"captions": ()}, "name at least one"),
        ({"captions": (("re_caption", "a"), ("org_caption", "a"))}, "a, a: name at least one, and each once"),
        ({"placeholders": 1}, "placeholders is 1"),
    ],
)
def test_options_that_cannot_be(shards, table, options, message):
    with pytest.raises(OpenVisionError, match=message):
        recap(shards, table, replace(OPTIONS, **options))


def test_nothing_is_overwritten(shards, table, tmp_path):
    with pytest.raises(OpenVisionError, match="is the folder of the shards"):
        recap(shards, table, replace(OPTIONS, output=shards / "../shards"))
    (tmp_path / "output").mkdir()
    (tmp_path / "output/mine.txt").write_text("precious")
    with pytest.raises(OpenVisionError, match=r"output folder .*output is not empty"):
        recap(shards, table, replace(OPTIONS, output=tmp_path / "output"))
    assert contents(tmp_path / "output") == {"mine.txt": b"precious"}


def test_a_work_folder_belongs_to_one_join(shards, table, tmp_path):
    options = replace(OPTIONS, work=tmp_path / "work", dry_run=True)
    recap(shards, table, options)
    with pytest.raises(OpenVisionError, match="holds a join begun with by = 'hash', not 'url'"):
        recap(shards, table, replace(options, by="url"))
    (table / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(OpenVisionError, match="holds a join begun with files"):
        recap(shards, table, options)
    (tmp_path / "work/settings.json").write_text("{")
    with pytest.raises(OpenVisionError, match=r"settings\.json cannot be read"):
        recap(shards, table, options)


@pytest.mark.parametrize("keep", [700, 30_000, -10_240])
def test_a_shard_cut_short_is_named(shards, table, keep):
    path = shards / "000002.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OpenVisionError, match=r"000002\.tar is truncated or not a tar"):
        recap(shards, table, OPTIONS)


def test_from_the_command_line(shards, table, tmp_path):
    arguments = ["data", "recap", str(shards), str(table), "--caption", "re_caption=long", "--by", "url"]
    result = CliRunner().invoke(app, [*arguments, "--report", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    for line in (
        "samples on disk",
        "86.5%",
        "image not on disk",
        "captions with fixed encoding: 2",
        "failed to download 180",
    ):
        assert line in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["by"], report["mode"], report["samples"]["joined"]) == ("url", "sidecar", 800)
    assert ShardDataset(shards, synthetic_key="long")[0].synthetic == "A long caption of image 0."

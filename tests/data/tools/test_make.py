"""Shards made from tables, folders and datasets hold the images as they were, under keys that stay."""

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.shards.dataset import Sample, ShardDataset
from openvision.data.tools.make import is_held_out, make_shards, prepare_image, stable_key
from openvision.data.tools.readers import Columns, folder_rows, hugging_face_rows, table_rows
from openvision.errors import OpenVisionError
from openvision.images.decode import BadSampleError, decode_image
from tests.conftest import draw


def encoded(kind: str, size: int = 24, **options) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size, 2 * size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_table(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "data/images"
    folder.mkdir(parents=True)
    (folder / "car.jpg").write_bytes(encoded("JPEG"))
    (folder / "car.png").write_bytes(draw("red", "bar"))
    (folder / "dog.webp").write_bytes(encoded("WEBP"))
    (folder / "old.bmp").write_bytes(encoded("BMP"))
    (folder / "bad.jpg").write_bytes(b"not an image")
    return folder


def samples(folder: Path) -> dict[str, Sample]:
    return {sample.meta.get("file", sample.key): sample for sample in ShardDataset(folder)}


def table(images: Path, name: str = "table.csv", delimiter: str = ",") -> Path:
    rows = [
        ["", "path", "caption", "re_caption", "source"],
        ["0", "images/car.jpg", "a cär, red", "A car. It is red.", "web"],
        ["1", "./images/old.bmp", "old", "", "scan"],
        ["2", "images/bad.jpg", "bad", "", "web"],
        ["3", "images/none.jpg", "none", "", "web"],
        ["4", "images/dog.webp", " ", "", "web"],
        ["5", "", "nothing", "", "web"],
        ["6", "images/car.jpg", "a second text", "", "web"],
        ["7", "images/car.jpg", "a second text", "", "web"],
    ]
    return write_table(images.parent / name, rows, delimiter)


@pytest.mark.parametrize(("name", "delimiter"), [("table.csv", ","), ("table.tsv", "\t")])
def test_a_table(images, tmp_path, name, delimiter):
    path = table(images, name, delimiter)
    made = make_shards(table_rows(path, Columns()), tmp_path / "out")
    found = list(ShardDataset(tmp_path / "out/train"))
    assert [(sample.alt, sample.synthetic) for sample in found] == [
        ("a cär, red", "A car. It is red."),
        ("old", None),
        ("a second text", None),
    ]
    assert found[0].image == (images / "car.jpg").read_bytes()
    assert found[0].meta == {"source": "web", "file": "images/car.jpg"}
    assert found[2].key == f"{found[0].key}-2"
    assert found[1].extension == "png"
    assert np.array_equal(decode_image(found[1].image), decode_image((images / "old.bmp").read_bytes()))
    reasons = ["undecodable", "missing_file", "empty_text", "no_image", "repeated_row"]
    assert made.reasons == dict.fromkeys(reasons, 1)
    assert (made.samples, made.changed) == ({"train": 3}, {"converted": 1})
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [reject["reason"] for reject in rejects] == reasons
    assert "bad.jpg" in rejects[0]["detail"] or "row 3" in rejects[0]["detail"]
    assert json.loads((tmp_path / "out/make.json").read_text())["samples"] == {"train": 3}


def test_json_lines(images, tmp_path):
    path = images.parent / "table.jsonl"
    lines = [
        json.dumps({"file": "images/car.jpg", "texts": ["one", "two"], "long": ["A.", "B."], "score": 0.5, "x": {}}),
        "{",
        "[]",
        json.dumps({"file": "images/car.png", "texts": None, "long": "x"}),
    ]
    path.write_text("\n".join(lines))
    made = make_shards(table_rows(path, Columns(alt="texts", synthetic="long")), tmp_path / "out")
    found = list(ShardDataset(tmp_path / "out/train"))
    assert [(sample.alt, sample.synthetic) for sample in found] == [("one", ["A.", "B."]), ("two", ["A.", "B."])]
    assert found[0].meta == {"score": 0.5, "file": "images/car.jpg"}
    assert made.reasons == {"bad_row": 2, "empty_text": 1}


def test_rows_with_too_few_and_too_many_fields(images, tmp_path):
    rows = [["image", "text"], ["images/car.jpg"], ["images/car.jpg", "a", "b"], ["images/car.jpg", "good"]]
    path = write_table(images.parent / "t.csv", rows)
    made = make_shards(table_rows(path, Columns()), tmp_path / "out")
    assert (made.samples, made.reasons) == ({"train": 1}, {"bad_row": 2})


def test_paths_outside_are_taken_when_they_exist(images, tmp_path):
    rows = [["image", "text"], ["../images/car.jpg", "up"], ["../../etc/none.png", "none"], [str(images), "folder"]]
    path = write_table(images.parent / "tables/t.csv", rows)
    made = make_shards(table_rows(path, Columns()), tmp_path / "out")
    assert (made.samples, made.reasons) == ({"train": 1}, {"missing_file": 2})


def test_keys_do_not_depend_on_the_other_rows(images, tmp_path):
    path = table(images)
    make_shards(table_rows(path, Columns()), tmp_path / "one")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *reversed(lines[1:3])]) + "\n")
    make_shards(table_rows(path, Columns()), tmp_path / "two")
    one, two = (samples(tmp_path / name / "train") for name in ("one", "two"))
    assert two["images/old.bmp"].key == one["images/old.bmp"].key == stable_key("images/old.bmp")
    assert stable_key("a/Öl & Wasser.v2.png").startswith("l-wasser-v2-")
    assert stable_key("a/x.png") != stable_key("b/x.png")
    assert len(stable_key("x" * 300)) < 95


def test_a_folder_with_texts_or_classes(tmp_path):
    folder = tmp_path / "images"
    for name in ("red_bar/1.png", "red_bar/2.PNG", "blue/1.png", "0.png", ".hidden/x.png", "notes.md"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw("red" if "red" in name else "blue", "bar"))
    (folder / "red_bar/2.txt").write_text("its own text\n")
    made = make_shards(folder_rows(folder), tmp_path / "out")
    found = samples(tmp_path / "out/train")
    assert {name: sample.alt for name, sample in found.items()} == {
        "blue/1.png": "blue",
        "red_bar/1.png": "red bar",
        "red_bar/2.PNG": "its own text",
    }
    assert made.reasons == {"empty_text": 1}


def many(folder: Path, count: int) -> Path:
    for index in range(count):
        path = folder / f"c{index % 2}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw("red", "bar", 8))
    return folder


def test_a_folder_without_texts_is_kept_where_that_is_asked_for(images, tmp_path):
    """For images that are captioned afterwards."""
    with pytest.raises(OpenVisionError, match="no row can be used"):
        make_shards(folder_rows(images), tmp_path / "none")
    made = CliRunner().invoke(app, ["data", "make", str(tmp_path / "out"), "--folder", str(images), "--without-text"])
    assert made.exit_code == 0, made.output
    assert {str(sample.alt) for sample in ShardDataset(tmp_path / "out/train")} == {""}
    assert len(ShardDataset(tmp_path / "out/train")) == 4


def test_the_hold_out_is_a_share_of_keys_and_stays(tmp_path):
    folder = many(tmp_path / "images", 60)
    made = make_shards(folder_rows(folder), tmp_path / "out", holdout=0.25)
    assert made.samples.total() == 60
    validation = samples(tmp_path / "out/validation")
    assert 5 < len(validation) < 25
    assert not validation.keys() & samples(tmp_path / "out/train").keys()
    (folder / "c0/0.png").unlink()
    make_shards(folder_rows(folder), tmp_path / "less", holdout=0.25)
    assert samples(tmp_path / "less/validation").keys() == validation.keys() - {"c0/0.png"}
    assert sum(is_held_out(f"key{index}", 0.1) for index in range(5000)) == pytest.approx(500, abs=100)


def test_texts_of_one_image_stay_on_one_side(images, tmp_path):
    rows = [["image", "text"]]
    rows += [[f"images/{name}", f"text {index}"] for index in range(6) for name in ("car.jpg", "car.png", "dog.webp")]
    holdout = next(share / 100 for share in range(1, 99) if splits(share / 100) == {True, False})
    make_shards(table_rows(write_table(images.parent / "t.csv", rows), Columns()), tmp_path / "out", holdout=holdout)
    files = [{sample.meta["file"] for sample in ShardDataset(tmp_path / "out" / s)} for s in ("train", "validation")]
    assert files[0] | files[1] == {"images/car.jpg", "images/car.png", "images/dog.webp"}
    assert not files[0] & files[1]


def splits(share: float) -> set[bool]:
    names = ("car.jpg", "car.png", "dog.webp")
    return {is_held_out(stable_key(f"images/{name}"), share) for name in names}


def test_bytes_are_those_of_the_source_unless_they_must_change():
    for kind, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        image = prepare_image(encoded(kind), max_side=48)
        assert (image.data, image.extension, image.change) == (encoded(kind), extension, None)
    smaller = prepare_image(encoded("JPEG"), max_side=20)
    assert (smaller.extension, smaller.change) == ("jpg", "downscaled")
    assert decode_image(smaller.data).shape == (10, 20, 3)
    assert prepare_image(encoded("WEBP"), max_side=20).extension == "png"
    assert prepare_image(encoded("TIFF")).change == "converted"


@pytest.mark.parametrize("data", [b"", encoded("PNG")[:-40], encoded("JPEG")[:300], encoded("EPS")])
def test_broken_images_and_formats_that_would_start_a_program_are_refused(data, monkeypatch):
    def started(*_, **__) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", started)
    with pytest.raises(BadSampleError) as bad:
        prepare_image(data)
    assert bad.value.reason == "undecodable"


def test_nothing_is_left_of_what_fails(images, tmp_path):
    out = tmp_path / "out"
    path = write_table(images.parent / "t.csv", [["image", "text"], ["images/bad.jpg", "x"]])
    with pytest.raises(OpenVisionError, match=r"no row can be used \(undecodable 1\); the first: .*row 1"):
        make_shards(table_rows(path, Columns()), out)
    good = write_table(images.parent / "g.csv", [["image", "text"], ["images/car.jpg", "x"]])
    with pytest.raises(OpenVisionError, match=r"leaves nothing for (train|validation) of 1 samples"):
        make_shards(table_rows(good, Columns()), out, holdout=0.5)
    with pytest.raises(OpenVisionError, match=r"no column 'nope'; its columns are: image, text"):
        make_shards(table_rows(good, Columns(alt="nope")), out)
    odd = write_table(images.parent / "o.csv", [["a", "b"], ["images/car.jpg", "x"]])
    with pytest.raises(OpenVisionError, match=r"name the column to read with --image-column"):
        make_shards(table_rows(odd, Columns()), out)
    (images.parent / "latin.csv").write_bytes("image,text\nimages/car.jpg,é\n".encode("latin-1"))
    with pytest.raises(OpenVisionError, match=r"latin\.csv cannot be read.*UTF-8"):
        make_shards(table_rows(images.parent / "latin.csv", Columns()), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_what_exists_is_not_replaced(images, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OpenVisionError, match="out exists"):
        make_shards(folder_rows(images), out)
    assert (out / "mine.txt").read_text() == "mine"


@pytest.fixture
def stand_in(monkeypatch) -> SimpleNamespace:
    """The part of the `datasets` library that `readers` uses; the tests do without it."""

    class Feature:
        def __init__(self, decode: bool = True, names: tuple[str, ...] = ()) -> None:
            self.decode, self.names = decode, names

        def int2str(self, value: int) -> str:
            return self.names[value]

    class Image(Feature):
        pass

    class Label(Feature):
        pass

    class Table(list):
        features: dict[str, object]

        @property
        def column_names(self) -> list[str]:
            return list(self.features)

        def cast_column(self, name: str, feature: Feature) -> "Table":
            assert isinstance(self.features[name], Image)
            assert not feature.decode
            return self

    class Splits(dict):
        pass

    table = Table(
        [
            {"image": {"bytes": draw("red", "bar"), "path": None}, "label": 0, "n": 1},
            {"image": {"bytes": draw("blue", "bar"), "path": "x.png"}, "label": 1, "n": float("nan")},
            {"image": None, "label": 1, "n": 1},
            {"image": {"bytes": draw("green", "bar"), "path": None}, "label": -1, "n": 1},
        ]
    )
    table.features = {"image": Image(), "label": Label(names=("a red one", "a blue one")), "n": Feature()}

    def load_dataset(name: str) -> Splits:
        if name != "someone/drawings":
            raise ValueError(f"{name} is not on the Hub")
        return Splits(train=table)

    module = SimpleNamespace(
        Image=Image,
        ClassLabel=Label,
        DatasetDict=Splits,
        load_from_disk=lambda _: table,
        load_dataset=load_dataset,
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_hugging_face_data_set(tmp_path, on_disk):
    source = str(tmp_path) if on_disk else "someone/drawings"
    made = make_shards(hugging_face_rows(source, "train", Columns()), tmp_path / "out")
    found = list(ShardDataset(tmp_path / "out/train"))
    assert [(sample.alt, sample.meta) for sample in found] == [
        ("a red one", {"n": 1}),
        ("a blue one", {}),
        ("-1", {"n": 1}),
    ]
    assert found[0].image == draw("red", "bar")
    assert made.reasons == {"no_image": 1}


@pytest.mark.usefixtures("stand_in")
def test_unknown_data_sets_and_splits():
    with pytest.raises(OpenVisionError, match=r"'nobody/x' cannot be opened: nobody/x is not on the Hub"):
        next(hugging_face_rows("nobody/x", "train", Columns()))
    with pytest.raises(OpenVisionError, match=r"no split 'test'; its splits are: train"):
        next(hugging_face_rows("someone/drawings", "test", Columns()))


def test_the_command(images, tmp_path):
    out = tmp_path / "out"
    arguments = ["data", "make", str(out), "--table", str(table(images)), "--max-side", "32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "left out, undecodable: 1" in result.output
    assert "samples: 3 for train" in result.output
    assert max(decode_image(sample.image).shape[1] for sample in ShardDataset(out / "train")) == 32
    result = CliRunner().invoke(app, ["data", "make", str(tmp_path / "x")])
    assert "exactly one of --table, --folder and --dataset" in str(result.exception)

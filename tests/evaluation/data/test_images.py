"""Images with labels or texts, from every place they may lie; what is wrong with them is one sentence."""

import io
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import cast

import numpy as np
import pytest
from PIL import Image

from openvision.data.shards.dataset import ShardWriter
from openvision.errors import OpenVisionError
from openvision.evaluation.data.hugging_face import captioned_dataset, labelled_dataset
from openvision.evaluation.data.images import folder_of_classes, labelled_shards, take
from openvision.evaluation.data.karpathy import karpathy
from openvision.evaluation.data.options import LabelOptions, TextOptions, open_captioned, open_labelled
from openvision.images.decode import BadSampleError


@pytest.fixture
def folder(tmp_path, picture):
    for name in ("square", "long_bar"):
        place = tmp_path / "images" / name
        place.mkdir(parents=True)
        for colour in ("red", "blue", "green"):
            (place / f"{colour}.png").write_bytes(picture(colour, name.removeprefix("long_")))
    return tmp_path / "images"


@pytest.fixture
def shards(tmp_path, picture):
    with ShardWriter(tmp_path / "shards", samples_per_shard=2) as writer:
        for number, (colour, shape) in enumerate([("red", "square"), ("blue", "bar"), ("green", "square")]):
            meta = {"shape": shape, "number": number % 2, "synthetic": f"A {colour} {shape}. It is flat."}
            writer.write(f"{colour}-{shape}", picture(colour, shape), "png", f"{colour}\n{shape}\n", meta)
    return tmp_path / "shards"


def test_a_folder_of_classes(folder) -> None:
    data = folder_of_classes(folder)
    assert data.classes == ["long bar", "square"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.images.keys[0] == "long_bar/blue.png"
    assert data.images.load(5).shape == (40, 40, 3)
    assert folder_of_classes(folder, ["pole", "box"]).classes == ["pole", "box"]


@pytest.mark.parametrize("names", [["square", "long bar"], ["square", "long_bar"], ["long_bar", "square"]])
def test_names_of_the_folders_are_matched_by_name(folder, names) -> None:
    data = folder_of_classes(folder, names)
    assert [name.replace("_", " ") for name in data.classes] == ["long bar", "square"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.only(2).naming == "by name: the list holds the names of the folders"


def test_other_names_are_paired_by_position_and_it_is_said(folder) -> None:
    naming = folder_of_classes(folder, ["pole", "box"]).naming
    assert naming == "by position: folder 'long bar' is 'pole', folder 'square' is 'box'"
    with pytest.raises(OpenVisionError, match=r"1 of 2 class names .* but 'box' is not, and folder 'long bar' is not"):
        folder_of_classes(folder, ["square", "box"])


def test_the_identity_follows_the_files(folder, picture) -> None:
    before = folder_of_classes(folder).images.identity
    assert folder_of_classes(folder).images.identity == before
    (folder / "square" / "pink.png").write_bytes(picture("pink", "square"))
    assert folder_of_classes(folder).images.identity != before


def test_a_class_folder_without_pictures(folder) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(OpenVisionError, match=r"class folder .*empty has no images"):
        folder_of_classes(folder)


def test_a_list_of_names_of_another_length(folder) -> None:
    with pytest.raises(OpenVisionError, match="2 class folders but there are 3 class names"):
        folder_of_classes(folder, ["a", "b", "c"])


def test_a_folder_without_subfolders_or_none_at_all(folder, tmp_path) -> None:
    with pytest.raises(OpenVisionError, match="has no subfolders"):
        folder_of_classes(folder / "square")
    with pytest.raises(OpenVisionError, match="does not exist"):
        folder_of_classes(tmp_path / "nowhere")


def test_shards_by_field_and_member(shards) -> None:
    data = labelled_shards(shards, "shape")
    assert (data.classes, data.labels.tolist()) == (["bar", "square"], [1, 0, 1])
    assert data.images.keys == ["red-square", "blue-bar", "green-square"]
    assert data.images.load(1)[20, 20].tolist() == [40, 60, 220]
    assert labelled_shards(shards, "txt").classes[0] == "blue\nbar"


def test_numbers_are_places_in_the_list(shards) -> None:
    data = labelled_shards(shards, "number", ["even", "odd"])
    assert (data.classes, data.labels.tolist()) == (["even", "odd"], [0, 1, 0])
    (shards / "classnames.txt").write_text("zero\none\n")
    assert labelled_shards(shards, "number").classes == ["zero", "one"]
    with pytest.raises(OpenVisionError, match="blue-bar has the label 1, which is not one of the 1 class names"):
        labelled_shards(shards, "number", ["even"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bar", "square", "disc"], "1 of 3 classes have no image, 'disc' first"),
        (["bar", "square", "bar"], r"'bar' is listed twice \(lines 1 and 3\)"),
        (["bar", " "], "class name 2 is empty"),
        ([], "list of class names is empty"),
        (["bar"], "label 'square', which is not one of the 1 class names"),
    ],
)
def test_names_that_do_not_fit(shards, names, message) -> None:
    with pytest.raises(OpenVisionError, match=message):
        labelled_shards(shards, "shape", names)


def test_a_label_that_is_missing(shards) -> None:
    with pytest.raises(OpenVisionError, match="red-square has no 'colour'"):
        labelled_shards(shards, "colour")


def test_a_quick_look_is_evenly_spread(folder) -> None:
    data = folder_of_classes(folder).only(2)
    assert (data.images.keys, data.labels.tolist()) == (["long_bar/blue.png", "square/red.png"], [0, 1])
    whole = folder_of_classes(folder)
    assert whole.only(100) is whole
    assert data.images.identity != whole.images.identity
    assert (take(whole.images, [3]).load(0) == whole.images.load(3)).all()


def test_captions_lines_and_sentences(shards) -> None:
    root = shards.parent
    one = open_captioned("shards", root, TextOptions(text="txt"))
    assert one.one_each
    assert len(one.texts) == 3
    lines = open_captioned("shards", root, TextOptions(text="txt", lines=True))
    assert (lines.texts[:3], lines.owner.tolist()) == (["red", "square", "blue"], [0, 0, 1, 1, 2, 2])
    assert not lines.one_each
    sentences = open_captioned("shards", root, TextOptions(text="synthetic", sentences=True))
    assert [text.strip() for text in sentences.texts[:2]] == ["A red square", "It is flat"]
    assert sentences.owner.tolist() == [0, 0, 1, 1, 2, 2]
    assert open_captioned("shards", root, TextOptions(text="txt", lines=True, captions=1)).texts[1] == "blue"


def test_a_picture_without_caption(shards) -> None:
    with ShardWriter(shards.parent / "more") as writer:
        writer.write("good", _png(), "png", "a text", {})
        writer.write("bare", _png(), "png", "", {})
    with pytest.raises(OpenVisionError, match="1 of 2 images have no caption, bare first"):
        open_captioned("more", shards.parent, TextOptions())


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_folder_of_files_needs_annotations(folder) -> None:
    with pytest.raises(OpenVisionError, match="give `annotations` too"):
        open_captioned("images", folder.parent, TextOptions())


@pytest.fixture
def annotations(tmp_path):
    images = tmp_path / "coco"
    (images / "val2014").mkdir(parents=True)
    entries = []
    for number, split in enumerate(["test", "val", "test"]):
        name = f"{number}.png"
        (images / "val2014" / name).write_bytes(_png())
        sentences = [{"raw": f"caption {number}{letter} "} for letter in "abc"[: number + 1]]
        entries.append({"filename": name, "filepath": "val2014", "split": split, "sentences": sentences})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": entries}))
    return tmp_path


def test_karpathys_splits(annotations) -> None:
    data = karpathy(annotations / "dataset.json", annotations / "coco")
    assert data.texts == ["caption 0a", "caption 2a", "caption 2b", "caption 2c"]
    assert data.owner.tolist() == [0, 1, 1, 1]
    assert karpathy(annotations / "dataset.json", annotations / "coco", captions=1).texts == [
        "caption 0a",
        "caption 2a",
    ]
    options = TextOptions(annotations="dataset.json", split="val")
    assert open_captioned("coco", annotations, options).texts == ["caption 1a", "caption 1b"]


def test_what_karpathys_file_may_lack(annotations) -> None:
    file, images = annotations / "dataset.json", annotations / "coco"
    with pytest.raises(OpenVisionError, match="no split 'train'; it has test, val"):
        karpathy(file, images, "train")
    (images / "val2014" / "2.png").unlink()
    with pytest.raises(OpenVisionError, match=r"1 of 2 images .* are missing"):
        karpathy(file, images)
    file.write_text(json.dumps({"images": [{"filename": "0.png", "split": "test", "sentences": []}]}))
    (images / "0.png").write_bytes(_png())
    with pytest.raises(OpenVisionError, match=r"1 of 1 images have no caption, 0.png first"):
        karpathy(file, images)
    file.write_text("[]")
    with pytest.raises(OpenVisionError, match="not in Karpathy's layout"):
        karpathy(file, images)


class FakeDataset:
    """As much of a Hugging Face dataset as is used."""

    def __init__(self, rows, names=None) -> None:
        self.rows = rows
        self.column_names = list(rows[0])
        feature = SimpleNamespace(names=names) if names else SimpleNamespace()
        self.features = dict.fromkeys(self.column_names, feature)
        self.decode = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def cast_column(self, name, feature):
        assert (name, feature) == ("image", "as they are")
        return self


def library_of(dataset: FakeDataset) -> ModuleType:
    def load_dataset(name, split):
        if split != "test":
            raise ValueError(f"no split {split}")
        return dataset

    image = lambda decode: "as they are" if not decode else None  # noqa: E731
    return cast("ModuleType", SimpleNamespace(load_dataset=load_dataset, Image=image))


def test_a_hugging_face_dataset(picture) -> None:
    rows = [{"image": {"bytes": picture("red", "bar")}, "label": 1, "text": ["a", "b"]}]
    rows.append({"image": {"bytes": None}, "label": 0, "text": ["c"]})
    library = library_of(FakeDataset(rows, ["pole", "bar"]))
    data = labelled_dataset("some/set", "test", "image", "label", library=library)
    assert (data.classes, data.labels.tolist()) == (["pole", "bar"], [1, 0])
    assert data.images.load(0).shape == (40, 40, 3)
    with pytest.raises(BadSampleError, match="row 1 holds no image"):
        data.images.load(1)
    assert captioned_dataset("some/set", "test", "image", "text", library=library).texts == ["a", "b", "c"]
    with pytest.raises(OpenVisionError, match="no column 'class'; its columns are image, label, text"):
        labelled_dataset("some/set", "test", "image", "class", library=library)
    with pytest.raises(OpenVisionError, match="split 'dev', cannot be opened"):
        labelled_dataset("some/set", "dev", "image", "label", library=library)


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OpenVisionError, match=r"openvision-encoders\[datasets\]"):
        open_labelled("hf:some/set", tmp_path, LabelOptions())


def test_open_labelled_finds_out_what_it_is(folder, shards) -> None:
    assert open_labelled("images", folder.parent, LabelOptions()).classes == ["long bar", "square"]
    assert open_labelled("shards", folder.parent, LabelOptions(label="shape")).classes == ["bar", "square"]
    (folder.parent / "names.txt").write_text("pole\nbox\n")
    assert open_labelled("images", folder.parent, LabelOptions(classes="names.txt")).classes == ["pole", "box"]
    assert np.unique(open_labelled("images", folder.parent, LabelOptions(), 3).labels).tolist() == [0, 1]

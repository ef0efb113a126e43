"""The report of a tiny fake run: one file that needs nothing else, complete, with images that open."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.evaluation.metrics.patches import as_colours, dense_patch_tokens, principal_components
from openvision.evaluation.report.figures import stage_spans
from openvision.evaluation.report.gallery import FOUND, GALLERY, draw, read_gallery, write_gallery
from openvision.evaluation.report.run_page import build_report, read_log
from openvision.evaluation.suites.run import Settings, evaluated
from openvision.evaluation.suites.suite import load_suite
from openvision.models.vision import normalize
from openvision.weights.folder import load_folder, save_folder
from openvision.weights.load import load_checkpoint

SECTIONS = ("summary", "curves", "compute", "retrieval", "neighbours", "captions", "patches", "mistakes", "notes")
VOID = {"meta", "link", "img", "source", "br", "input"}


class Page(HTMLParser):
    """Attributes by tag, and a check that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(fake_run, fake_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(fake_run, run)
    return build_report(run, fake_data)


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page(report.read_text(encoding="utf-8"))


def sources(page: Page) -> list[str]:
    found = [attributes[key] for _, attributes in page.tags for key in ("src", "srcset") if key in attributes]
    return [source for source in found if source]


def test_the_page_is_well_formed_and_complete(page) -> None:
    assert page.open == []
    anchors = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert tuple(anchors) == SECTIONS
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"].removeprefix("#") for tag, attributes in page.tags if tag == "a"]
    assert set(links) <= set(ids)


def test_the_page_asks_nothing_of_any_server(report, page) -> None:
    text = report.read_text(encoding="utf-8")
    without_images = re.sub(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"(https?:)?//[a-z]", without_images)
    assert "@import" not in text
    assert "url(" not in text
    for _, attributes in page.tags:
        for key in ("src", "srcset", "href", "action", "data"):
            assert attributes.get(key, "#").startswith(("#", "data:"))


def test_every_image_opens_and_has_an_alternative_text(page) -> None:
    found = sources(page)
    # Two curves in two themes, and the galleries.
    assert len(found) > 4 + 8 * 6 + 6 * 6
    for source in found:
        data = base64.b64decode(source.partition(";base64,")[2], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert min(image.size) > 1
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_the_page_holds_numbers_baselines_and_names(page) -> None:
    for expected in (
        "a <tiny> run",
        "Nothing was trained & nothing is known.",
        "held-out, compositional: 12 images, 12 names",
        "pixel neighbour, k = 10",
        "zero-shot top-5",
        "16 px, then 32 px",
        "own zero-shot guess",
        " <on> white.",
        "weights, SHA-256",
    ):
        assert expected in page.text
    assert sum(tag == "tr" for tag, _ in page.tags) > 2 * 10


def test_pngs_lie_beside_the_page(report) -> None:
    names = {path.name for path in report.parent.iterdir()}
    assert names == {
        "index.html", "learning_curves.png", "accuracy.png", "retrieval.png", "neighbours.png", "patches.png"
    }  # fmt: skip
    for name in names - {"index.html"}:
        with Image.open(report.parent / name) as image:
            assert np.asarray(image).std() > 1


def test_a_second_report_is_the_same_and_keeps_the_evaluation(report, fake_data) -> None:
    run = report.parent.parent
    before = (run / "evaluation.json").stat().st_mtime_ns, report.read_bytes()
    build_report(run, fake_data)
    assert ((run / "evaluation.json").stat().st_mtime_ns, report.read_bytes()) == before


@pytest.mark.slow
def test_an_evaluation_of_another_checkpoint_is_made_again(report, fake_data) -> None:
    run = report.parent.parent
    path = run / "evaluation.json"
    good = path.read_text()
    path.write_text(re.sub(r'("sha256": ")[0-9a-f]{8}', r"\g<1>00000000", good, count=1))
    build_report(run, fake_data)
    assert '"sha256": "00000000' not in path.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("", "no training steps"), ('{"kind": "train"\n{}\n', "line 1 is not JSON")],
)
def test_a_bad_log_is_told(tmp_path, content, message) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OpenVisionError, match=message):
        read_log(path)


def test_a_line_cut_short_at_the_end_is_left_out(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    assert read_log(path) == [{"kind": "train", "step": 1}]


def test_stage_spans() -> None:
    lines = [
        {"stage": 0, "samples": 100, "resolution": 32},
        {"stage": 0, "samples": 900, "resolution": 32},
        {"stage": 1, "samples": 1500},
    ]
    assert stage_spans(lines, "samples", 100) == [(0.0, 9.0, "32 px"), (9.0, 15.0, "stage 2")]


def test_drawing_by_lot_takes_turns_and_repeats() -> None:
    groups = ["a"] * 10 + ["b"] * 2 + ["c"]
    drawn = draw(groups, 6, seed=0)
    assert [groups[index] for index in drawn] == ["a", "b", "c", "a", "b", "a"]
    assert drawn == draw(groups, 6, seed=0)
    assert drawn != draw(groups, 6, seed=1)
    assert sorted(draw(groups, 99, seed=0)) == list(range(13))


def test_galleries_tell_right_from_wrong(fake_run, fake_data, tmp_path) -> None:
    suite = load_suite("heldout")
    model = evaluated(load_checkpoint(fake_run / "model"), Settings())
    write_gallery(tmp_path, suite.shown(suite.evaluators), model, fake_data)
    shown = read_gallery(tmp_path)["evaluators"]
    # Of several baselines on the same data the first shows the neighbours.
    assert [title.partition(", ")[2] for title in shown] == [
        "names", "name retrieval", "alt-texts", "first sentences", "groups", "captions", "baselines, names"
    ]  # fmt: skip
    for query in shown["heldout_compositional, name retrieval"].get("queries", []):
        right = [place for place, found in enumerate(query["found"], start=1) if found["right"]]
        assert right == ([query["place"]] if query["place"] <= FOUND else [])
        assert all(found["name"] == query["text"] for found in query["found"] if found["right"])
        assert all(found["image"] == query["right"] for found in query["found"] if found["right"])
    for mistake in shown["heldout_compositional, names"].get("mistakes", []):
        assert mistake["true"] != mistake["answer"]
        assert mistake["image"] != mistake["bearer"]
    for caption in shown["heldout_compositional, captions"].get("captions", []):
        assert caption["guess"] in {f"{colour} {shape}" for colour in ("pink", "black", "brown", "violet")
                                    for shape in ("square", "bar", "pole")}  # fmt: skip
        assert caption["true"].startswith("A ")
    for example in shown["heldout_compositional, baselines, names"].get("neighbours", []):
        assert [found["name"].split()[0] in ("red", "green", "blue", "yellow") for found in example["nearest"]] == [
            True
        ] * 5


def test_a_gallery_of_an_earlier_version_is_read(tmp_path) -> None:
    old = {
        "evaluators": {
            "a": {"queries": [{"found": [{"picture": "x", "key": "k"}]}], "confusions": [{"pictures": ["x"]}]}
        },
        "pictures": {"x": "data:"},
    }
    (tmp_path / GALLERY).write_text(json.dumps(old))
    assert read_gallery(tmp_path) == {
        "evaluators": {"a": {"queries": [{"found": [{"image": "x", "name": "k"}]}], "confusions": [{"images": ["x"]}]}},
        "patches": [],
        "images": {"x": "data:"},
    }


def test_a_model_without_a_text_tower_has_no_report(fake_run, fake_data, tmp_path) -> None:
    shutil.copytree(fake_run, tmp_path / "run")
    model, _, _ = load_folder(fake_run / "model")
    save_folder(tmp_path / "run/model", model.vision, None, "", {})
    with pytest.raises(OpenVisionError, match="holds no zero-shot numbers"):
        build_report(tmp_path / "run", fake_data)


def test_dense_tokens_are_those_of_shifted_images(fake_run) -> None:
    model, _, _ = load_folder(fake_run / "model")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    # Shifts of -3, -1, 1 and 3 pixels with the border repeated outwards.
    fine = dense_patch_tokens(model.vision, images, 4)
    assert fine.shape == (2, 16, 16, 32)
    padded = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="edge"))
    for a, b in ((0, 0), (1, 3), (3, 2)):
        shifted = padded[..., 2 * a : 2 * a + 32, 2 * b : 2 * b + 32]
        with torch.no_grad():
            tokens = model.vision.forward_features(normalize(shifted)).patch_tokens
        assert torch.allclose(fine[:, a::4, b::4].flatten(1, 2), tokens, atol=1e-5)
    with pytest.raises(ValueError, match="does not divide"):
        dense_patch_tokens(model.vision, images, 3)


def test_components_find_the_direction_of_difference() -> None:
    tokens = torch.zeros(4, 2, 2, 5)
    # The place is worth more than the content, and is taken away.
    tokens += 100 * torch.arange(4.0).view(1, 2, 2, 1)
    tokens[..., 3] += torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1)
    components = principal_components(tokens)
    assert components.shape == (4, 2, 2, 3)
    assert components[:, 0, 0, 0] == pytest.approx([-0.5, -0.5, 0.5, 0.5])
    colours = as_colours(components)
    assert colours.dtype == np.uint8
    assert (colours[0, 0, 0, 0], colours[3, 0, 0, 0]) == (0, 255)

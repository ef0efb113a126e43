"""A run is measured on the held-out sets of its own data: those of scenes, or the validation split of any shards."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openvision.cli.app import app
from openvision.data.shards.dataset import ShardDataset
from openvision.data.sources.scenes.make import Options, make_scenes
from openvision.errors import OpenVisionError
from openvision.evaluation.report.gallery import read_gallery
from openvision.evaluation.report.run_page import build_report
from openvision.evaluation.suites.held_out import MODEL, data_of, held_out_sets, held_out_suite
from openvision.evaluation.suites.results import read_result

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    return make_scenes(folder, Options(train=60, held_out=20, objects=5, word_share=0.9), workers=1)


@pytest.fixture(scope="module")
def run(fake_run, scenes, tmp_path_factory) -> Path:
    """A run with the report of its scenes."""
    folder = tmp_path_factory.mktemp("scenes") / "run"
    shutil.copytree(fake_run, folder)
    build_report(folder, scenes)
    return folder


def test_scenes_have_their_own_sets(run, scenes) -> None:
    assert held_out_suite(scenes).name == read_result(run).content["suite"]["name"] == "heldout_scenes"
    combinations, single = held_out_sets(read_result(run))
    assert (combinations.title, single.title) == ("held-out, combinations", "single objects")
    rows = combinations.rows
    assert {"top1", "short_t2i_r1", "short_t2i_r5", "word_pooled_top1", "count_pooled_top1"} <= rows[MODEL].keys()
    # Probes stand beside their own baselines, retrieval beside that by pixels.
    assert rows["chance"]["short_t2i_r1"].value == pytest.approx(1 / 20)
    assert 0 < rows["chance"]["word_pooled_top1"].value <= rows["majority"]["word_pooled_top1"].value
    assert "word_pooled_top1" in rows["pixel neighbour, k = 10"]
    assert "word_pooled_top1" not in single.rows[MODEL]


def test_the_report_shows_scenes_and_says_what_they_are(run, scenes) -> None:
    page = (run / "report/index.html").read_text(encoding="utf-8")
    assert "that training never shows together" in page
    assert "In the compositional set" not in page
    assert "trained from nothing" in page
    asked = read_gallery(run)["evaluators"]["heldout_combinations, short sentences"].get("queries", [])
    known = {sample.meta["short"] for sample in ShardDataset(scenes / "heldout_combinations")}
    assert asked
    assert {query["text"] for query in asked} <= known
    assert all(query["text"] in page.replace("&#39;", "'") for query in asked)


@pytest.fixture
def own(fake_data, fake_run, tmp_path) -> Path:
    """A run whose data have no held-out sets but a validation split, and which says where they are."""
    for split in ("train", "validation"):
        shutil.copytree(fake_data / {"validation": "heldout_random"}.get(split, split), tmp_path / "mine" / split)
    shutil.copytree(fake_run, tmp_path / "run")
    sessions = [{"data_folder": "elsewhere"}, {"data_folder": str(tmp_path / "mine")}]
    (tmp_path / "run/sessions.json").write_text(json.dumps(sessions))
    recipe = tmp_path / "run/recipe.toml"
    recipe.write_text('start = "openvision-vit-tiny-patch16-160"\n' + recipe.read_text())
    return tmp_path / "run"


def test_own_data_are_measured_on_their_validation_split(own, monkeypatch) -> None:
    monkeypatch.chdir(own.parent)
    done = RUNNER.invoke(app, ["eval", str(own)])
    assert done.exit_code == 0, done.output
    result = read_result(own)
    assert result.content["suite"]["name"] == "heldout_own"
    (validation,) = held_out_sets(result)
    assert (validation.title, validation.images) == ("validation", 6)
    assert {"top1", "t2i_r1", "alt_t2i_r1", "sentence_t2i_r1"} <= validation.rows[MODEL].keys()
    assert validation.rows["pixel neighbour, k = 1"]["top1"].value >= 0
    done = RUNNER.invoke(app, ["report", str(own)])
    assert done.exit_code == 0, done.output
    page = (own / "report/index.html").read_text(encoding="utf-8")
    assert "validation split of the run&#39;s own data" in page
    assert "trained from openvision-vit-tiny-patch16-160" in page


def test_classes_without_names_are_their_alt_texts(own) -> None:
    data = own.parent / "mine"
    suite = held_out_suite(data)
    assert [one.title for one in suite.evaluators][0] == "validation, names"
    assert data_of(own) == data_of(own / "model") == str(data)
    assert data_of(own.parent) is None


def test_data_without_anything_to_measure_on(tmp_path) -> None:
    with pytest.raises(OpenVisionError, match=r"holds neither held-out sets nor a validation split .* --holdout 0.1"):
        held_out_suite(tmp_path)

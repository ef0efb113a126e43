"""A run on scenes is measured on their held-out sets, and its report says what they are."""

import shutil
from pathlib import Path

import pytest

from openvision.data.shards.dataset import ShardDataset
from openvision.data.sources.scenes.make import Options, make_scenes
from openvision.evaluation.report.gallery import read_gallery
from openvision.evaluation.report.run_page import build_report
from openvision.evaluation.suites.held_out import MODEL, held_out_sets
from openvision.evaluation.suites.own import suite_of_run
from openvision.evaluation.suites.results import read_result


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


@pytest.mark.slow
def test_scenes_have_their_own_sets(run, scenes) -> None:
    assert suite_of_run(run, scenes)[0].name == read_result(run).content["suite"]["name"] == "heldout_scenes"
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

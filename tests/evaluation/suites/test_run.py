"""Suites: from checkpoints to files and a page; comparisons, tables, published numbers; what may go wrong."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from openvision.cli.compare import compare as compare_command
from openvision.cli.evaluate import evaluate
from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import parse_evaluators
from openvision.evaluation.metrics.bootstrap import Outcomes, difference
from openvision.evaluation.report.comparison_page import build_page
from openvision.evaluation.report.tables import open_clip_table
from openvision.evaluation.suites.compare import Row, compare, holm
from openvision.evaluation.suites.reported import beside, published_tables, reported
from openvision.evaluation.suites.results import EVALUATION, Entry, distinct, read_result
from openvision.evaluation.suites.run import Settings, released_name, run_suite, short_names
from openvision.evaluation.suites.suite import SUITES, load_suite
from openvision.files import atomic_write_text
from openvision.weights.registry import available_models, released

SUITE = """
description = "shapes <and> names"
[[evaluate]]
kind = "zero_shot"
name = "names"
data = "heldout_compositional"
open_clip = { top1 = "ImageNet 1k" }
reported = { top1 = "imagenet_top1" }
[[evaluate]]
kind = "zero_shot"
name = "shapes"
data = "heldout_compositional"
label = "category"
[[evaluate]]
kind = "retrieval"
name = "sentences"
data = "heldout_compositional"
text = "synthetic"
sentences = true
[[evaluate]]
kind = "knn"
data = "heldout_compositional"
train = "train"
label = "category"
"""


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "shapes.toml"
    path.write_text(SUITE)
    return path


@pytest.fixture(scope="module")
def runs(fake_run, tmp_path_factory) -> list[str]:
    """Two runs whose weights differ."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        shutil.copytree(fake_run, folder / name)
    weights = load_file(folder / "second/model/model.safetensors")
    generator = torch.Generator().manual_seed(5)
    weights["vision.head.weight"] = torch.randn(weights["vision.head.weight"].shape, generator=generator)
    save_file(weights, folder / "second/model/model.safetensors")
    return [str(folder / name / "model") for name in ("first", "second")]


@pytest.fixture(scope="module")
def results(runs, suite_file, fake_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    said: list[str] = []
    suite = load_suite(str(suite_file))
    found = run_suite(runs, suite, fake_data, output, say=said.append, command=["openvision", "eval"])
    assert any("names: top-1" in line for line in said)
    return found


def test_the_file_says_how_to_compute_it_again(results, runs, fake_data) -> None:
    content = json.loads((results[0].folder / EVALUATION).read_text())
    assert content["complete"]
    assert content["checkpoint"]["name"] == "first"
    assert len(content["checkpoint"]["sha256"]) == 64
    assert "a <tiny> run" in content["checkpoint"]["recipe"]
    assert content["command"] == ["openvision", "eval"]
    assert content["libraries"]["torch"]
    assert content["settings"] == {"resolution": 32, "preprocessing": "crop", "precision": "float32", "device": "cpu"}
    assert content["history"][0]["top1"] == pytest.approx(0.1)
    names = {entry["name"]: entry for entry in content["results"]}
    assert set(names) == {"names", "shapes", "sentences", "knn"}
    assert list(names["knn"]["data"]) == [str(fake_data / "train"), str(fake_data / "heldout_compositional")]
    assert results[0].sha256 != results[1].sha256


def test_what_was_written_is_what_is_read(results) -> None:
    again = read_result(results[0].folder)
    assert again.content == json.loads(json.dumps(results[0].content))
    for evaluator, entry in again.measured.items():
        for metric, value in entry["values"].items():
            outcomes = again.outcomes(evaluator, metric)
            if outcomes is not None:
                assert outcomes.mean == pytest.approx(value)
    assert again.outcomes("names", "ece") is None


def test_an_interrupted_evaluation_goes_on(runs, suite_file, fake_data, tmp_path, monkeypatch) -> None:
    from openvision.evaluation.suites import run as module

    suite = load_suite(str(suite_file))
    real = module.measure_all
    taken: list[str] = []

    def counting(evaluators, subject, root):
        for pair in real(evaluators, subject, root):
            taken.append(pair[0].title)
            yield pair
            if len(taken) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "measure_all", counting)
    with pytest.raises(KeyboardInterrupt):
        run_suite(runs[:1], suite, fake_data, tmp_path, say=taken.copy().append)
    assert not read_result(tmp_path / "first").content["complete"]
    (result,) = run_suite(runs[:1], suite, fake_data, tmp_path, say=lambda line: None)
    assert taken == ["names", "shapes", "sentences", "knn"]
    assert result.content["complete"]
    # Other settings are another evaluation.
    taken.clear()
    result.content["complete"] = False
    atomic_write_text(result.folder / EVALUATION, json.dumps(result.content))
    monkeypatch.setattr(module, "measure_all", lambda e, s, r: (taken.append(x[0].title) or x for x in real(e, s, r)))
    run_suite(runs[:1], suite, fake_data, tmp_path, Settings(resolution=16), say=lambda line: None)
    assert taken == ["names", "shapes", "sentences", "knn"]


def test_comparisons_are_paired_and_corrected(results) -> None:
    found = compare(results[0], results[1])
    assert {row.evaluator for row in found.rows} == {"names", "shapes", "sentences", "knn"}
    assert found.left_out == []
    for row in found.rows:
        assert row.difference.value == pytest.approx(row.first - row.second)
        assert row.corrected_p >= row.difference.p
    same = compare(results[0], results[0])
    assert same.verdict() == f"no difference beyond noise on any of {len(same.rows)} metrics"


def test_a_real_difference_is_called_one(results) -> None:
    worse = replace(results[1], content=json.loads(json.dumps(results[0].content)), tensors=dict(results[0].tensors))
    worse.content["checkpoint"]["name"] = "worse"
    best = replace(results[0], tensors=dict(results[0].tensors))
    for metric in ("top1", "top5"):
        best.tensors[f"names/{metric}/values"] = np.ones(12, dtype=np.uint8)
        worse.tensors[f"names/{metric}/values"] = np.zeros(12, dtype=np.uint8)
    verdict = compare(best, worse).verdict()
    assert verdict.startswith("first is better: on 2 of")
    assert compare(worse, best).verdict() == verdict
    worse.tensors["knn/top1/values"] = np.ones(12, dtype=np.uint8)
    best.tensors["knn/top1/values"] = np.zeros(12, dtype=np.uint8)
    assert "neither is better throughout" in compare(best, worse).verdict()


def test_other_data_or_options_are_not_compared(results) -> None:
    other = replace(results[1], content=json.loads(json.dumps(results[1].content)))
    other.content["results"][0]["data"] = {"elsewhere": "0" * 64}
    other.content["results"][1]["options"]["prompts"] = "short"
    other.content["results"].pop()
    found = compare(results[0], other)
    assert found.left_out == [
        "names: measured on different data",
        "shapes: measured with different options",
        "knn: not measured on second",
    ]
    assert {row.evaluator for row in found.rows} == {"sentences"}


def test_holms_correction() -> None:
    def row(p):
        base = difference(Outcomes.of(np.ones(2)), Outcomes.of(np.ones(2)))
        return Row("e", "m", 0, 0, replace(base, p=p))

    corrected = [one.corrected_p for one in holm([row(0.04), row(0.01), row(0.03), row(0.005)])]
    assert corrected == pytest.approx([0.06, 0.03, 0.06, 0.02])


def test_the_page_holds_all_it_shows(results, tmp_path) -> None:
    text = build_page(results, tmp_path / "index.html").read_text()
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert len([source for source in sources if source.startswith("data:image")]) > 30
    assert "shapes &lt;and&gt; names" in text
    assert compare(results[0], results[1]).verdict() in text
    for anchor in re.findall(r'href="#([^"]+)"', text):
        assert f'id="{anchor}"' in text
    for result in results:
        assert result.sha256 in text
    # One checkpoint alone has nothing to be compared with.
    alone = build_page(results[:1], tmp_path / "alone.html").read_text()
    assert 'id="differences"' not in alone
    with pytest.raises(OpenVisionError, match="no results"):
        build_page([], tmp_path / "none.html")


def test_published_numbers() -> None:
    assert reported("openvision-vit-large-patch14-224", "imagenet_top1") == 78.5
    assert reported("openvision-vit-tiny-patch16-160", "coco_t2i_r1") is None
    for name in available_models():
        assert reported(name, "imagenet_top1") == released(name).imagenet_top1
    # Multimodal tables have the same form.
    tables = published_tables("openvision.multimodal.benchmarks")
    large = next(table.rows["OpenVision 2 L/14 224 px"] for table in tables if "2509.01644" in table.source)
    assert large["textvqa"] == 59.0
    assert "mmvet" not in large


@pytest.mark.parametrize(
    ("low", "high", "agrees"), [(0.780, 0.790, True), (0.7855, 0.79, True), (0.786, 0.79, False), (0.7, 0.784, False)]
)
def test_a_reproduction_that_is_off_is_flagged(low, high, agrees) -> None:
    numbers = {"values": {"top1": 0.785}, "intervals": {"top1": [low, high]}}
    measured = cast("Entry", {"reported": {"top1": "imagenet_top1"}, "options": {}, **numbers})
    found = beside("openvision-vit-large-patch14-224", measured, "top1")
    assert found is not None
    assert found.agrees is agrees
    assert beside(None, measured, "top1") is None
    measured["options"] = {"limit": 10}
    assert beside("openvision-vit-large-patch14-224", measured, "top1") is None


def test_ours_stands_beside_the_published_number(results, tmp_path) -> None:
    known = replace(results[0], content=json.loads(json.dumps(results[0].content)))
    known.content["checkpoint"]["released"] = "openvision-vit-tiny-patch16-224"
    text = build_page([known], tmp_path / "index.html").read_text()
    assert 'id="reported"' in text
    assert 'class="off">off<' in text


def test_open_clips_columns(results) -> None:
    lines = open_clip_table(results).splitlines()
    assert lines[0] == "name,pretrained,params (M),ImageNet 1k"
    top1 = results[1].measured["names"]["values"]["top1"]
    assert lines[2].split(",")[0] == "second"
    assert float(lines[2].split(",")[3]) == pytest.approx(top1, abs=1e-4)


def test_suites_that_come_along_are_well_formed() -> None:
    for name in SUITES:
        suite = load_suite(name)
        assert suite.evaluators
        assert suite.description
    held_out = load_suite("heldout")
    assert {one.data for one in held_out.evaluators} == set(held_out.sets)
    assert all(one.title.startswith(f"{one.data}, ") for one in held_out.evaluators)
    assert all(one.data == held_out.sets[0] for one in held_out.shown(held_out.evaluators))
    titles = {one.title for one in load_suite("paper").evaluators}
    assert {"ImageNet", "COCO val", "COCO test 5k", "Flickr30k test 1k"} <= titles


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the suite is empty"),
        ("evaluate = 3", "must be tables"),
        ("descripton = 'x'", "unknown key descripton"),
        ("[[evaluate", "not valid TOML"),
        ("sets = 'a'\n[[evaluate]]\nkind = 'zero_shot'", "must be a list of data folders"),
        ("[[evaluate]]\nkind = 'zero_shot'", "key data is missing"),
    ],
)
def test_broken_suites(tmp_path, text, message) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(OpenVisionError, match=message):
        load_suite(str(tmp_path / "s.toml"))


def test_missing_data_are_listed_and_may_be_skipped(runs, suite_file, fake_data, tmp_path) -> None:
    with pytest.raises(
        OpenVisionError, match="neither heldout, heldout_scenes, quick, scenes, paper, own nor a TOML file"
    ):
        load_suite("quik")
    text = SUITE + '[[evaluate]]\nkind = "zero_shot"\nname = "more"\ndata = "nowhere"\n'
    (tmp_path / "s.toml").write_text(text)
    suite = load_suite(str(tmp_path / "s.toml"))
    with pytest.raises(OpenVisionError, match=r"more: .*nowhere is missing; --skip-missing measures the others"):
        run_suite(runs[:1], suite, fake_data, tmp_path / "o", say=lambda line: None)
    assert not (tmp_path / "o").exists()
    (result,) = run_suite(runs[:1], suite, fake_data, tmp_path / "o", skip_missing=True, say=lambda line: None)
    assert result.content["skipped"] == [f"more: {fake_data / 'nowhere'} is missing"]
    with pytest.raises(OpenVisionError, match="lacks data below"):
        run_suite(runs[:1], suite, tmp_path, tmp_path / "p", skip_missing=True)


def test_a_wrong_checkpoint_is_told_before_any_is_measured(runs, suite_file, fake_data, tmp_path) -> None:
    with pytest.raises(OpenVisionError, match="nowhere"):
        run_suite([runs[0], "nowhere"], load_suite(str(suite_file)), fake_data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_checkpoints() -> None:
    assert short_names(["runs/a/model", "runs/b/model/", "x/a/model", "org/name", "w.safetensors"]) == [
        "a",
        "b",
        "a-2",
        "name",
        "w",
    ]
    with pytest.raises(OpenVisionError, match="at least one checkpoint"):
        short_names([])
    assert released_name("UCSC-VLAA/openvision-vit-tiny-patch16-224") == "openvision-vit-tiny-patch16-224"
    assert released_name("runs/a/model") is None


def test_results_of_one_name_are_told_apart(results, tmp_path) -> None:
    for place in ("a", "b"):
        shutil.copytree(results[0].folder, tmp_path / place / "first")
    both = distinct([read_result(tmp_path / place / "first") for place in ("a", "b")])
    assert [result.name for result in both] == ["a/first", "b/first"]
    with pytest.raises(OpenVisionError, match="are the same result"):
        distinct([read_result(tmp_path / "a/first"), read_result(tmp_path / "a/first")])


def test_folders_that_hold_no_result(tmp_path, results) -> None:
    with pytest.raises(OpenVisionError, match="measure first"):
        read_result(tmp_path)
    (tmp_path / EVALUATION).write_text("{}")
    with pytest.raises(OpenVisionError, match="not a result of a suite"):
        read_result(tmp_path)
    shutil.copy(results[0].folder / EVALUATION, tmp_path / EVALUATION)
    with pytest.raises(OpenVisionError, match="does not exist"):
        read_result(tmp_path)


def test_commands(runs, suite_file, fake_data, tmp_path) -> None:
    app = typer.Typer()
    app.command("eval")(evaluate)
    app.command("compare")(compare_command)
    options = ["--suite", str(suite_file), "--data", str(fake_data), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["eval", *runs, *options, "--csv", str(tmp_path / "t.csv")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/index.html").is_file()
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert lines[0] == "|  | first | second |"
    assert lines[2].startswith("| names: top-1 | ")
    assert lines[-1].startswith("data: ")
    assert (tmp_path / "t.csv").read_text().startswith("name,pretrained")
    folders = [str(tmp_path / "out" / name) for name in ("first", "second")]
    done = CliRunner().invoke(app, ["compare", *folders, "--page", str(tmp_path / "two.html")])
    assert done.exit_code == 0, done.output
    assert "names: top1" in done.output
    assert "noise" in done.output
    assert (tmp_path / "two.html").is_file()
    done = CliRunner().invoke(app, ["eval", "--suite", "quick", "--template", "a {}"])
    assert isinstance(done.exception, OpenVisionError)


def test_a_suite_that_needs_texts_and_a_tower_without(runs, fake_data, tmp_path) -> None:
    from openvision.weights.folder import load_folder, save_folder

    model, _, _ = load_folder(Path(runs[0]))
    save_folder(tmp_path / "tower/model", model.vision, None, "", {})
    (tmp_path / "s.toml").write_text(SUITE)
    suite = load_suite(str(tmp_path / "s.toml"))
    tower = [str(tmp_path / "tower/model")]
    (result,) = run_suite(tower, suite, fake_data, tmp_path / "o", say=lambda line: None)
    assert list(result.measured) == ["knn"]
    assert result.content["skipped"][0] == "names: needs a text tower"
    only_text = replace(suite, evaluators=parse_evaluators([{"kind": "zero_shot", "data": "train"}], "t"))
    with pytest.raises(OpenVisionError, match="measures nothing on it: zero_shot: needs a text tower"):
        run_suite(tower, only_text, fake_data, tmp_path / "p", say=lambda line: None)


def test_what_needs_one_grid_is_skipped_on_native_shapes(runs, fake_data, tmp_path) -> None:
    (tmp_path / "s.toml").write_text(f'{SUITE}[[evaluate]]\nkind = "correspondence"\ndata = "train"\n')
    suite, native = load_suite(str(tmp_path / "s.toml")), Settings(preprocessing="native")
    (result,) = run_suite([runs[0]], suite, fake_data, tmp_path / "o", native, say=lambda line: None)
    assert "knn" in result.measured
    assert result.content["skipped"] == ["correspondence: compares patches of one grid; measure it without --native"]

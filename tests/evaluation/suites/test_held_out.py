"""The held-out evaluation of a run: the suite `heldout`, its tables, old results, commands, bad input."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from openvision.cli.compare import compare
from openvision.cli.evaluate import evaluate
from openvision.cli.report import report
from openvision.data.shards.dataset import ShardDataset
from openvision.encoding import collapse_repeats, encode_images, encode_texts, generate_captions
from openvision.errors import OpenVisionError
from openvision.evaluation.report.gallery import GALLERY
from openvision.evaluation.report.tables import print_held_out
from openvision.evaluation.suites.held_out import METRICS, MODEL, Share, current_result, held_out_sets, measure_run
from openvision.evaluation.suites.results import read_result
from openvision.images.preprocess import decode_image, prepare, to_batch
from openvision.terminal import Console
from openvision.weights.folder import load_folder


@pytest.fixture
def model(fake_run):
    return load_folder(fake_run / "model")[:2]


@pytest.fixture
def images(fake_data) -> torch.Tensor:
    samples = ShardDataset(fake_data / "heldout_compositional")
    return to_batch([prepare(decode_image(sample.image), 32) for sample in samples])


@pytest.fixture(scope="module")
def run(fake_run, fake_data, tmp_path_factory) -> Path:
    """A run with its held-out evaluation."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(fake_run, folder)
    measure_run(folder, fake_data)
    return folder


def test_every_metric_stands_beside_the_baselines(run) -> None:
    compositional, random = held_out_sets(read_result(run))
    assert (compositional.title, compositional.images, compositional.candidates) == ("held-out, compositional", 12, 12)
    assert (random.name, random.images) == ("heldout_random", 6)
    rows = compositional.rows
    assert list(rows) == ["chance", "majority", "pixel neighbour, k = 1", "pixel neighbour, k = 10", "model"]
    assert rows["chance"]["top1"].value == pytest.approx(1 / 12)
    assert rows["majority"]["top1"].value <= 1 / 12
    # The same shapes in the same places were trained on in other colours: pixels know the shape.
    assert rows["pixel neighbour, k = 1"]["category_top1"].value > rows["chance"]["category_top1"].value
    # Short sentences and probes belong to scenes.
    metrics = {name for name in METRICS if not name.startswith(("short", "word", "count"))}
    assert metrics <= rows[MODEL].keys()
    for row in ("majority", "pixel neighbour, k = 1", "pixel neighbour, k = 10"):
        assert {name for name in metrics if not name.startswith("sentence")} <= rows[row].keys()
    for name, share in rows[MODEL].items():
        if name in METRICS:
            assert share.interval is not None
            assert 0 <= share.interval[0] <= share.value <= share.interval[1] <= 1
    assert set(compositional.by_group) == {"bar", "pole", "square"}
    # A group that only training images have is a candidate too; here there is none.
    assert read_result(run).measured["heldout_random, groups"]["facts"]["classes"] == 3


def test_the_file_is_that_of_any_suite(run) -> None:
    content = json.loads((run / "evaluation.json").read_text())
    assert content["complete"]
    assert content["suite"]["name"] == "heldout"
    assert content["checkpoint"]["name"] == "run"
    assert len(content["checkpoint"]["sha256"]) == 64
    assert content["libraries"]["torch"]
    names = {entry["name"].partition(", ")[2] for entry in content["results"]}
    assert {"names", "captions", "baselines, groups"} <= names
    assert (run / GALLERY).is_file()


def test_tables_in_the_terminal(run) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_held_out(read_result(run), console)
    printed = console.export_text()
    assert "held-out, compositional: 12 images, 12 names" in printed
    assert "zero-shot top-5" in printed


def test_a_current_evaluation_is_kept_and_one_of_other_weights_is_made_again(run, fake_data, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = (copy / "evaluation.json").stat().st_mtime_ns
    assert current_result(copy, fake_data).sha256 == read_result(run).sha256
    assert (copy / "evaluation.json").stat().st_mtime_ns == before
    weights = load_file(copy / "model/model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, copy / "model/model.safetensors")
    assert current_result(copy, fake_data).sha256 != read_result(run).sha256
    assert (copy / "evaluation.json").stat().st_mtime_ns != before


def test_a_result_of_an_earlier_version_is_translated(golden_folder) -> None:
    folder = golden_folder / "run-2026-11/openvision/finished"
    old = json.loads((folder / "evaluation.json").read_text())
    result = read_result(folder)
    assert result.sha256 == old["artefact"]["checkpoint_sha256"]
    assert result.content["settings"]["intervals"] == "Wilson score"
    assert result.tensors == {}
    for held_out in held_out_sets(result):
        before = old["sets"][held_out.name]
        assert held_out.images == before["model"]["pictures"]
        assert held_out.by_group == before["model"]["top1_by_category"]
        assert held_out.prompts == "{}"
        for row, shares in held_out.rows.items():
            assert shares.keys() == {name for name, value in before[row].items() if isinstance(value, float)}
            for name, share in shares.items():
                assert share.value == before[row][name]
                assert share.interval == (tuple(before[row][f"{name}_ci"]) if f"{name}_ci" in before[row] else None)


def test_a_run_without_a_model_is_told(tmp_path, fake_data) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(OpenVisionError, match=r"model.* holds neither|not a model folder|no config"):
        measure_run(tmp_path, fake_data)


def test_results_need_a_run_or_a_folder(fake_run, fake_data, tmp_path) -> None:
    shutil.copytree(fake_run / "model", tmp_path / "weights")
    with pytest.raises(OpenVisionError, match="is not the folder of a run; give -o FOLDER"):
        measure_run(tmp_path / "weights", fake_data)


def test_a_missing_split_is_told(fake_run, tmp_path) -> None:
    with pytest.raises(OpenVisionError, match=r"names and 8 more: .*heldout_compositional is missing"):
        measure_run(fake_run, tmp_path)


def test_commands(fake_run, fake_data, tmp_path) -> None:
    for name in ("run", "other"):
        shutil.copytree(fake_run, tmp_path / name)
    run, other = tmp_path / "run", tmp_path / "other"
    app = typer.Typer()
    for command in (evaluate, report, compare):
        app.command()(command)
    template = ["--template", "{}", "--template", "a drawing of {}"]
    # The folder of the run or of its model.
    for place in (run, other / "model"):
        done = CliRunner().invoke(app, ["evaluate", str(place), "--data", str(fake_data), *template])
        assert done.exit_code == 0, done.output
    names = read_result(run).measured["heldout_random, names"]
    assert names["options"]["prompts"] == ["{}", "a drawing of {}"]
    assert names["facts"]["prompts"] == "{}; a drawing of {}"
    done = CliRunner().invoke(app, ["report", str(run), "--data", str(fake_data)])
    assert done.exit_code == 0, done.output
    assert (run / "report" / "index.html").is_file()
    done = CliRunner().invoke(app, ["compare", str(run), str(other), "--page", str(tmp_path / "two.html")])
    assert done.exit_code == 0, done.output
    assert "no difference beyond noise" in done.output
    # Baselines are the same for every model.
    assert "baselines" not in done.output


def test_percent() -> None:
    shares = [Share(0.521, (0.472, 0.57)), Share(0.0025), Share(0.0)]
    assert [share.percent() for share in shares] == ["52.1 (47.2-57.0)", "0.25", "0.0"]
    assert shares[0].percent(digits=0) == "52.1 (47-57)"


def test_features_are_unit_vectors(model, images) -> None:
    network, tokenizer = model
    vectors, texts = encode_images(network, images, 7), encode_texts(network, tokenizer, list("abcdefghijkl"))
    assert vectors.shape == texts.shape == (12, network.config.embed_dim)
    assert np.linalg.norm(np.concatenate([vectors, texts]), axis=1) == pytest.approx(np.ones(24), abs=1e-5)


def test_captions_are_texts_of_the_tokenizer(model, images) -> None:
    network, tokenizer = model
    names = [f"thing {number}" for number in range(12)]
    captions = generate_captions(network, tokenizer, images, names, batch_size=5)
    assert len(captions) == 12
    assert captions == generate_captions(network, tokenizer, images, names)
    assert not any("[" in caption for caption in captions if "unk" not in caption.lower())
    assert collapse_repeats([5, 5, 7, 5, 5]) == [5, 7, 5]


def test_captions_need_a_decoder_and_an_alt_text_each(model, images) -> None:
    network, tokenizer = model
    with pytest.raises(OpenVisionError, match="12 images but 1 alt-texts"):
        generate_captions(network, tokenizer, images, ["one"])
    network.decoder = None
    with pytest.raises(OpenVisionError, match="no caption decoder"):
        generate_captions(network, tokenizer, images, ["one"] * 12)

"""Evaluation of a model on shards: keys, invariances, the file it writes, bad input."""

import io
import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from openvision.cli.evaluate import evaluate
from openvision.cli.report import report
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.encoding import collapse_repeats, encode_images, encode_texts, generate_captions
from openvision.errors import OpenVisionError
from openvision.evaluation.data.split import read_split
from openvision.evaluation.suites.held_out import (
    evaluate_run,
    evaluate_split,
    load_evaluation,
    percent,
    print_tables,
    readable,
)
from openvision.weights.folder import load_folder


@pytest.fixture
def model(fake_run):
    return load_folder(fake_run / "model")[:2]


@pytest.fixture
def held_out(fake_data) -> ShardDataset:
    return ShardDataset(fake_data / "heldout_compositional")


def test_every_share_has_an_interval_around_it(model, held_out) -> None:
    network, tokenizer = model
    result = evaluate_split(network, tokenizer, held_out, 32)
    assert result["pictures"] == result["candidates"] == 12
    assert result["categories"] == 3
    recalls = product(("", "alt_", "sentence_"), ("t2i", "i2t"), (1, 5, 10))
    for name in ["top1", "top5", "category_top1", *(f"{prefix}{way}_r{k}" for prefix, way, k in recalls)]:
        low, high = result[f"{name}_ci"]
        assert 0 <= low <= result[name] <= high <= 1
    assert result["top1"] == result["i2t_r1"]
    assert result["t2i_r1"] <= result["t2i_r5"] <= result["t2i_r10"]


def test_batch_size_changes_nothing_and_the_mode_stays(model, held_out) -> None:
    network, tokenizer = model
    network.train()
    assert evaluate_split(network, tokenizer, held_out, 32, batch_size=5) == evaluate_split(
        network, tokenizer, held_out, 32
    )
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_model_of_nan_is_an_error(model, held_out) -> None:
    network, tokenizer = model
    with torch.no_grad():
        network.vision.head.weight[0, 0] = float("nan")
    with pytest.raises(OpenVisionError, match="12 of 12 image features hold NaN"):
        evaluate_split(network, tokenizer, held_out, 32)


def test_features_are_unit_vectors(model, held_out) -> None:
    network, tokenizer = model
    split = read_split(held_out, 32)
    images, texts = encode_images(network, split.images, 7), encode_texts(network, tokenizer, split.names)
    assert images.shape == texts.shape == (12, network.config.embed_dim)
    assert np.linalg.norm(np.concatenate([images, texts]), axis=1) == pytest.approx(np.ones(24), abs=1e-5)


def test_bad_pictures_are_counted_and_left_out(tmp_path, picture) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("good", picture("red", "square"), "png", "red square", {"name": "red square"})
        writer.write("bad", b"no picture", "png", "nothing", {"name": "nothing"})
        writer.write("fine", picture("blue", "bar"), "png", "blue bar", {"name": "blue bar"})
    split = read_split(ShardDataset(tmp_path), 32)
    assert (split.keys, split.indices, dict(split.rejected)) == (["good", "fine"], [0, 2], {"undecodable": 1})
    assert split.categories is None
    assert split.first_sentences is None


def test_a_missing_name_is_told_by_key(tmp_path, picture) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("one", picture("red", "square"), "png", "a", {"name": "a"})
        writer.write("two", picture("red", "bar"), "png", "b", {})
    with pytest.raises(OpenVisionError, match="sample two has no 'name'"):
        read_split(ShardDataset(tmp_path), 32)


def test_without_names_alt_texts_are_the_candidates(tmp_path, picture) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("one", picture("red", "square"), "png", "something red", {})
    assert read_split(ShardDataset(tmp_path), 32).names == ["something red"]


def test_only_bad_pictures_is_an_error(tmp_path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("bad", b"no picture", "png", "nothing", {"name": "nothing"})
    with pytest.raises(OpenVisionError, match="none of the 1 pictures"):
        read_split(ShardDataset(tmp_path), 32)


def test_evaluation_file(fake_run, fake_data, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(fake_run, run)
    evaluation = evaluate_run(run, fake_data, command=["openvision", "eval"])
    assert load_evaluation(run / "evaluation.json") == json.loads(json.dumps(evaluation))
    assert set(evaluation["sets"]) == {"heldout_compositional", "heldout_random"}
    rows = evaluation["sets"]["heldout_compositional"]
    assert list(rows) == ["chance", "majority", "pixel neighbour, k = 1", "pixel neighbour, k = 10", "model"]
    assert rows["chance"]["top1"] == pytest.approx(1 / 12)
    assert rows["majority"]["top1"] <= 1 / 12
    # The same shapes in the same places were trained on in other colours: pixels know the shape.
    assert rows["pixel neighbour, k = 1"]["category_top1"] > rows["chance"]["category_top1"]
    artefact = evaluation["artefact"]
    assert len(artefact["checkpoint_sha256"]) == 64
    assert set(artefact["data_manifest_sha256"]) == {"train", "heldout_compositional", "heldout_random"}
    assert artefact["command"] == ["openvision", "eval"]
    assert artefact["libraries"]["torch"]

    console = Console(width=100, record=True, file=io.StringIO())
    print_tables(evaluation, console)
    printed = console.export_text()
    assert "held-out, compositional: 12 pictures, 12 names" in printed
    assert "zero-shot top-5" in printed


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "is not an evaluation")]
)
def test_a_bad_evaluation_file_is_told(tmp_path, content, message) -> None:
    path: Path = tmp_path / "evaluation.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OpenVisionError, match=message):
        load_evaluation(path)


def test_a_run_without_a_model_is_told(tmp_path, fake_data) -> None:
    with pytest.raises(OpenVisionError, match="not a model folder"):
        evaluate_run(tmp_path, fake_data)


def test_a_missing_split_is_told(fake_run, tmp_path) -> None:
    with pytest.raises(OpenVisionError, match="train"):
        evaluate_run(fake_run, tmp_path)


def test_commands(fake_run, fake_data, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(fake_run, run)
    app = typer.Typer()
    app.command()(evaluate)
    app.command()(report)
    template = ["--template", "{}", "--template", "a drawing of {}"]
    done = CliRunner().invoke(app, ["evaluate", str(run), "--data", str(fake_data), *template])
    assert done.exit_code == 0
    assert load_evaluation(run / "evaluation.json")["protocol"]["templates"] == ["{}", "a drawing of {}"]
    done = CliRunner().invoke(app, ["report", str(run), "--data", str(fake_data)])
    assert done.exit_code == 0
    assert (run / "report" / "index.html").is_file()


def test_percent_and_readable() -> None:
    row = {"a": 0.521, "a_ci": [0.472, 0.57], "b": 0.0025, "c": 0.0}
    assert [percent(row, name) for name in "abcd"] == ["52.1 (47.2-57.0)", "0.25", "0.0", ""]
    assert percent(row, "a", digits=0) == "52.1 (47-57)"
    assert readable("people-body_&_hands") == "people body hands"


def test_captions_are_texts_of_the_tokenizer(model, held_out) -> None:
    network, tokenizer = model
    split = read_split(held_out, 32)
    captions = generate_captions(network, tokenizer, split.images, split.names, batch_size=5)
    assert len(captions) == 12
    assert captions == generate_captions(network, tokenizer, split.images, split.names)
    assert not any("[" in caption for caption in captions if "unk" not in caption.lower())
    assert collapse_repeats([5, 5, 7, 5, 5]) == [5, 7, 5]


def test_captions_need_a_decoder_and_an_alt_text_each(model, held_out) -> None:
    network, tokenizer = model
    images = read_split(held_out, 32).images
    with pytest.raises(OpenVisionError, match="12 images but 1 alt-texts"):
        generate_captions(network, tokenizer, images, ["one"])
    network.decoder = None
    with pytest.raises(OpenVisionError, match="no caption decoder"):
        generate_captions(network, tokenizer, images, ["one"] * 12)

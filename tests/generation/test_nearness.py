"""How near generated images are, and where the report of a run shows it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.app import app
from openvision.errors import OpenVisionError
from openvision.evaluation.report.run_page import build_report
from openvision.frozen.perceptual import EfficientNetDistance
from openvision.generation import nearness
from openvision.generation.generate import open_generator
from openvision.generation.nearness import measure_generator
from openvision.generation.train_generator import GeneratorTraining, train_generator
from openvision.models.openvision3 import OpenVision3, OpenVision3Config
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from tests.training.small_step import recipe_of

CPU = torch.device("cpu")
RECIPE = 'name = "three"\n[model]\nkind = "openvision3"\n[data]\ntrain = "train"\nvalidation = "validation"\n'


@pytest.fixture(scope="module")
def run(shapes_folder, tmp_path_factory) -> Path:
    """The folder of a run of an untrained OpenVision 3 model."""
    torch.manual_seed(0)
    config = recipe_of("openvision3").model
    assert isinstance(config, OpenVision3Config)
    folder = tmp_path_factory.mktemp("three") / "run"
    tokenizer = Tokenizer.train(["a red square", "a blue bar"], 40)
    save_folder(folder / "model", OpenVision3(config), tokenizer, RECIPE, {})
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "data.json").write_text(json.dumps({"folder": str(shapes_folder)}))
    where = {"step": 1, "stage": 0, "resolution": 32, "samples": 8, "seconds": 1.0, "tflops": 0.1}
    line = {"kind": "train", **where, "loss": 3.0, "contrastive": 3.0, "lr": 0.1, "logit_scale": 14.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@pytest.fixture(scope="module")
def generator(run, shapes_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generator") / "generator"
    train_generator(str(run), shapes_folder / "train", folder, GeneratorTraining("name", 2, 4), CPU)
    return folder


def first_pixels(self, images) -> torch.Tensor:
    """Three numbers an image instead of 1,280: a distance that a reader can compute."""
    return images.mean(dim=(2, 3))


def test_true_images_are_nearer_than_one_colour_and_the_lots_are_disjoint(
    run, generator, shapes_folder, monkeypatch
) -> None:
    monkeypatch.setattr(EfficientNetDistance, "features", first_pixels)
    opened = open_generator(generator, CPU, str(run))
    found = measure_generator(opened, shapes_folder / "validation", count=50, shown=3)
    assert set(found.rows) == {"generated", "reconstructed", "true", "one colour"}
    assert found.rows["true"]["fd_efficientnet_lite0"] < found.rows["one colour"]["fd_efficientnet_lite0"]
    assert found.facts["images"] == 8
    assert found.facts["field"] == "name"
    assert found.made.shape == found.true.shape == found.reconstructed.shape == (3, 32, 32, 3)
    asked, texts, others = nearness._two_lots(opened, shapes_folder / "validation", 50)
    assert len(texts) == len(asked) == len(others) == 8
    assert not any(torch.equal(one, other) for one in asked for other in others)
    with pytest.raises(OpenVisionError, match="fewer than four images have a 'title'"):
        measure_generator(
            type(opened)(opened.model, opened.encoder, opened.tokenizer, "title"), shapes_folder / "validation"
        )


def test_agreement_counts_images_whose_own_text_is_nearest(run, generator, monkeypatch) -> None:
    opened = open_generator(generator, CPU, str(run))
    classes = np.eye(16, dtype=np.float32)[:3]
    embeds = np.stack([classes[0], classes[1], classes[0] + classes[2], classes[1]])
    monkeypatch.setattr(nearness, "encode_images", lambda *_: embeds)
    # Right, right, a tie, wrong.
    assert nearness._agreement(opened.encoder, torch.empty(4, 0), classes, np.array([0, 1, 2, 2])) == 0.5


@pytest.mark.slow
def test_the_report_shows_reconstructions_beside_the_ceiling_and_generated_images(
    run, generator, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(EfficientNetDistance, "features", first_pixels)
    page = build_report(run).read_text(encoding="utf-8")
    assert "autoencoder alone: the ceiling" in page
    assert "one colour for all" in page
    assert '<section id="generated">' not in page
    names = {path.name for path in (run / "report").iterdir()}
    assert "reconstructions.png" in names
    assert not {"generated.png", "generated.json"} & names

    result = CliRunner().invoke(app, ["report", str(run), "--generator", str(generator), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    section = page.partition('<section id="generated">')[2].partition("</section>")[0]
    # Twelve at most, and the validation has sixteen images in two lots.
    assert len(re.findall("<figure>", section)) == 8
    assert len(re.findall("<img", section)) == 3 * 8
    numbers = json.loads((run / "report" / "generated.json").read_text())
    assert f"{numbers['rows']['generated']['fd_efficientnet_lite0']:.1f}" in section
    with Image.open(run / "report" / "generated.png") as image:
        assert np.asarray(image).std() > 1

    torch.manual_seed(1)
    config = recipe_of("openvision3").model
    assert isinstance(config, OpenVision3Config)
    save_folder(tmp_path / "model", OpenVision3(config), Tokenizer.train(["a red square"], 40), RECIPE, {})
    with pytest.raises(OpenVisionError, match="is not the encoder that"):
        nearness.measure_for_run(generator, tmp_path, None, CPU)

"""The Python API: what a notebook calls, and what a training loop of one's own needs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import openvision
from openvision.errors import OpenVisionError
from openvision.recipe.schema import dump_recipe

ROOT = Path(__file__).parents[1]
PIXELS = [np.full((40, 30, 3), value, dtype=np.uint8) for value in (0, 90, 200)]


@pytest.fixture(scope="module")
def encoder(tiny_run):
    return openvision.load(tiny_run)


def test_the_import_is_light():
    heavy = "[name for name in ('torch', 'numpy', 'typer') if name in sys.modules]"
    code = f"import sys, openvision; print(openvision.__all__, {heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "'evaluate'" in done.stdout


def test_every_public_name_is_there():
    for name in openvision.__all__:
        assert callable(getattr(openvision, name))


def test_load_moves_and_converts(tiny_run):
    half = openvision.load(tiny_run, device="cpu", dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    exact = openvision.load(tiny_run, device=torch.device("cpu"))
    assert next(exact.model.parameters()).dtype == torch.float32
    assert exact.source == str(tiny_run / "model")
    assert torch.cosine_similarity(half.encode_images(PIXELS), exact.encode_images(PIXELS)).min() > 0.99
    assert next(openvision.load_vision(tiny_run, dtype=torch.bfloat16).vision.parameters()).dtype == torch.bfloat16


def test_a_device_that_is_not_there_is_named_before_weights_are_read(tmp_path):
    with pytest.raises(OpenVisionError, match="device 'gpu' is unknown"):
        openvision.load(tmp_path / "nothing", device="gpu")


def test_similarity_is_the_cosine_of_inputs_or_vectors(encoder):
    texts = ["a red square", "a bar"]
    cosines = encoder.similarity(PIXELS, texts)
    assert cosines.shape == (3, 2)
    images, words = encoder.encode_images(PIXELS), encoder.encode_texts(texts)
    assert torch.allclose(
        cosines, torch.nn.functional.cosine_similarity(images[:, None], words[None], dim=-1), atol=1e-6
    )
    assert torch.equal(encoder.similarity(images, words), cosines)
    assert torch.equal(encoder.similarity(images, texts), cosines)


def test_a_loop_sees_what_the_encoder_sees(encoder):
    texts = ["a red square", "a bar", "a corner"]
    batch = torch.stack([encoder.preprocess(pixels) for pixels in PIXELS])
    with torch.no_grad():
        output = encoder.model(batch, encoder.tokenize(texts))
    assert torch.allclose(output.image_embeds, encoder.encode_images(PIXELS), atol=1e-6)
    assert torch.allclose(output.text_embeds[0], encoder.encode_texts(texts), atol=1e-6)
    with pytest.raises(OpenVisionError, match="list of texts"):
        encoder.tokenize("a bar")


def test_a_changed_model_is_saved_and_read_back(tiny_run, tmp_path):
    encoder = openvision.load(tiny_run, dtype=torch.bfloat16)
    assert encoder.model.vision.head is not None
    with torch.no_grad():
        encoder.model.vision.head.weight.mul_(-1)
    encoder.save(tmp_path / "mine")
    again = openvision.load(tmp_path / "mine")
    assert next(again.model.parameters()).dtype == torch.float32
    assert next(encoder.model.parameters()).dtype == torch.bfloat16
    opposite = torch.cosine_similarity(again.encode_images(PIXELS), openvision.load(tiny_run).encode_images(PIXELS))
    assert opposite.max() < -0.99
    with pytest.raises(OpenVisionError, match="not empty"):
        encoder.save(tmp_path / "mine")


def test_train_resumes_and_evaluate_measures(tiny_recipe, shapes_folder, tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(dump_recipe(tiny_recipe))
    changes = {"stages.0.samples": 16, "stages.0.warmup_samples": 8, "stages.1.samples": 16, "run.device": "cpu"}
    model = openvision.train(recipe, shapes_folder, tmp_path / "run", changes)
    assert model == tmp_path / "run/model"
    steps = (tmp_path / "run/metrics.jsonl").read_text()
    assert openvision.train(recipe, shapes_folder, tmp_path / "run", changes) == model
    assert (tmp_path / "run/metrics.jsonl").read_text() == steps
    told = []
    numbers = openvision.evaluate(
        tmp_path / "run", device="cpu", progress=lambda done, total: told.append((done, total))
    )
    assert 0 <= next(values["top1"] for values in numbers.values() if "top1" in values) <= 1
    assert (tmp_path / "run/evaluation.json").is_file()
    assert told[-1] == (16, 16)


def test_bad_input_is_one_sentence(tiny_run, shapes_folder, tmp_path):
    with pytest.raises(OpenVisionError, match="batch_size is 0"):
        openvision.evaluate(tiny_run, shapes_folder, batch_size=0)
    with pytest.raises(OpenVisionError, match=r"nothing\.toml"):
        openvision.train(tmp_path / "nothing.toml", shapes_folder, tmp_path / "run")


def test_torch_hub_from_a_clone(tiny_run):
    found = torch.hub.load(str(ROOT), "encoder", str(tiny_run), source="local")
    assert isinstance(found, openvision.Encoder)
    tower = torch.hub.load(str(ROOT), "vision", str(tiny_run), source="local")
    assert isinstance(tower, openvision.VisionEncoder)
    assert torch.equal(tower.encode_images(PIXELS), found.encode_images(PIXELS))

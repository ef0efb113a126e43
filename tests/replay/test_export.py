"""Public bug reports about exports, tried here."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import openvision
from openvision.errors import OpenVisionError
from openvision.models.layers import unit
from openvision.models.vision import normalize
from openvision.weights.export.onnx import check_onnx, open_session
from openvision.weights.export.parity import compare, require_parity
from openvision.weights.export.targets import ExportOptions, at_resolution, export
from openvision.weights.load import Checkpoint
from tests.replay import models


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return models.checkpoint()


@pytest.fixture(scope="module")
def graphs(checkpoint, tmp_path_factory) -> Path:
    """Graphs of any batch and resolution."""
    path = tmp_path_factory.mktemp("export") / "onnx"
    export(checkpoint, "onnx", path, ExportOptions(dynamic_resolution=True, check=False))
    return path


@pytest.fixture(scope="module")
def vit(checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "vit"
    export(checkpoint, "transformers", path, ExportOptions(check=False))
    return path


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_graphs_take_any_batch(checkpoint, graphs, batch):
    """hqucms/weaver-core#29: the exporter made the batch of its example a constant of the graph."""
    images, ids = torch.randn(batch, 3, 40, 40), torch.from_numpy(checkpoint.tokenizer.encode(["a cat"] * batch, 12))
    (embeds,) = open_session(graphs / "vision.onnx").run(["image_embeds"], {"images": images.numpy()})
    (texts,) = open_session(graphs / "text.onnx").run(None, {"ids": ids.numpy()})
    with torch.inference_mode():
        assert compare("images", checkpoint.model.encode_image(images), torch.from_numpy(embeds), 2e-5).passed
        assert compare("texts", checkpoint.model.encode_text(ids), torch.from_numpy(texts), 2e-5).passed


def test_the_check_runs_other_batches_than_the_example(checkpoint, graphs):
    """huggingface/transformers#27790: a batch was written into the code of CLAP, and no test used another."""
    told = [result.what for result in check_onnx(checkpoint, graphs)]
    for batch in (1, 3, 7):
        assert any(what.startswith(f"image features of {batch} x") for what in told)
        assert f"text features, batch {batch}" in told
    assert len({what.split(" of ")[1].split(" x ", 1)[1] for what in told if what.startswith("image features")}) == 3


@pytest.mark.parametrize(("height", "width"), [(40, 40), (24, 72), (64, 64), (8, 200)])
def test_positions_follow_the_resolution(checkpoint, graphs, height, width):
    """openvinotoolkit/openvino.genai#4444: a graph resized its positions in another way than the model, silently."""
    images = torch.randn(2, 3, height, width)
    embeds, tokens = open_session(graphs / "vision.onnx").run(None, {"images": images.numpy()})
    with torch.inference_mode():
        ours = checkpoint.vision.forward_features(images)
        assert compare("tokens", ours.patch_tokens, torch.from_numpy(tokens), 2e-5).passed
        assert compare("image", unit(checkpoint.vision.project(ours.pooled)), torch.from_numpy(embeds), 2e-5).passed


def test_the_folder_says_how_images_are_prepared(checkpoint, graphs):
    """huggingface/pytorch-image-models#2463: a graph lost 7 points because its images were prepared in another way."""
    how = json.loads((graphs / "onnx.json").read_text())["preprocessing"]
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    told = ((pixels * how["scale"] - how["mean"]) / how["std"]).transpose(2, 0, 1)[None].astype(np.float32)
    encoder = openvision.Encoder(checkpoint.model, checkpoint.tokenizer)
    assert np.allclose(told, normalize(encoder.preprocess(pixels)[None]).numpy(), atol=1e-5)
    (embeds,) = open_session(graphs / "vision.onnx").run(["image_embeds"], {"images": told})
    assert np.allclose(embeds, encoder.encode_images([pixels]).numpy(), atol=2e-5)


def test_bad_embeddings_of_lower_precision_are_refused(checkpoint, graphs, tmp_path):
    """josephrocca/openai-clip-js#3: quantised graphs gave noticeably worse embeddings, which nobody had measured."""
    folder = tmp_path / "int8"
    shutil.copytree(graphs, folder)
    told = json.loads((folder / "onnx.json").read_text())
    (folder / "onnx.json").write_text(json.dumps(told | {"precision": "int8"}))
    images = torch.randint(0, 255, (4, 3, 40, 40), dtype=torch.uint8)
    (measured,) = (one for one in check_onnx(checkpoint, folder, images) if "4 given images" in one.what)
    assert measured.passed
    # A model from which the graphs have drifted away.
    other = models.checkpoint()
    with torch.no_grad():
        assert other.vision.head is not None
        other.vision.head.weight.add_(0.5 * torch.randn(24, 48))
    with pytest.raises(
        OpenVisionError, match=r"features of 4 given images, as 1 - cosine: .*tolerance 2e-02, TOO LARGE"
    ):
        require_parity(check_onnx(other, folder, images))


def test_a_text_feature_of_transformers_is_a_tensor(checkpoint, vit):
    """embeddings-benchmark/mteb#4081: since transformers 5 a feature is an object, and callers skipped every item.

    The call in the README of an export is run as it stands there.
    """
    card = (vit / "README.md").read_text()
    snippet = next(part for part in card.split("```python\n") if "SiglipTextModel" in part.split("```")[0]).split(
        "```"
    )[0]
    found: dict = {}
    exec(snippet.replace("FOLDER", str(vit)), found)
    assert isinstance(found["embedding"], torch.Tensor)
    ours = openvision.Encoder(checkpoint.model, checkpoint.tokenizer).encode_texts(["A Photo Of A CAT"])
    assert torch.allclose(unit(found["embedding"]), ours, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 3)])
def test_images_of_one_pixel_in_the_exported_processor(checkpoint, vit, size):
    """huggingface/transformers#21638: the channel axis of an image of one pixel was guessed, and wrongly."""
    from transformers import AutoImageProcessor

    image = Image.new("RGB", size, (200, 30, 90))
    theirs = AutoImageProcessor.from_pretrained(vit)(image, return_tensors="pt")["pixel_values"]
    ours = normalize(openvision.Encoder(checkpoint.model, None).preprocess(np.asarray(image))[None])
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_an_export_for_another_resolution_is_not_resized(checkpoint, tmp_path):
    """huggingface/pytorch-image-models#1794: positions of a local checkpoint were not adapted to another image size."""
    from transformers import ViTModel

    export(checkpoint, "transformers", tmp_path / "vit", ExportOptions(resolution=56, check=False))
    tower = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    images = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        found = tower(images, output_hidden_states=True).hidden_states[-1][:, 1:]
        ours = at_resolution(checkpoint, 56).vision.forward_features(images).patch_tokens
    require_parity([compare("patch tokens", ours, found)])

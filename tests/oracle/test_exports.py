"""Exports into stock timm and open_clip, and JAX trees as Orbax writes them."""

# pyright: reportMissingImports=false

from pathlib import Path

import numpy as np
import orbax.checkpoint
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.variants import SIZES
from openvision.models.vision import VisionConfig, VisionTransformer, normalize
from openvision.text.tokenizer import Tokenizer
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.load import Checkpoint, Request, load_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "openvision_tiny.npz"
CONFIG = OpenVisionConfig(
    embed_dim=24,
    vision=VisionConfig(width=48, depth=3, mlp_dim=100, heads=3, patch_size=8, image_size=44),
    text=TextConfig(width=32, depth=2, mlp_dim=64, heads=2, vocab_size=120, context_length=12),
)


def stirred(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    model = stirred(OpenVision(CONFIG))
    tokenizer = Tokenizer.train(["a red circle on white", "two dogs, it's 3 o'clock SLEEPING"], 100)
    return Checkpoint(model.vision, model, tokenizer, "test", {})


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    export(checkpoint, "safetensors", path)
    return path


@pytest.mark.parametrize("target", ["open_clip", "timm", "transformers", "beit", "onnx"])
def test_the_command_prints_parity(folder, tmp_path, target) -> None:
    result = CliRunner().invoke(app, ["export", str(folder), "--to", target, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "largest difference" in result.output
    assert "TOO LARGE" not in result.output


@pytest.mark.parametrize("size", SIZES)
def test_timm_at_every_size(tmp_path, size) -> None:
    towers = SIZES[size]
    depth = towers.vision.depth if size in ("tiny", "small", "base") else 2
    config = VisionConfig(
        **towers.vision.sizes() | {"depth": depth}, patch_size=towers.patches[0], image_size=4 * towers.patches[0] + 6
    )
    torch.manual_seed(0)
    tower = stirred(VisionTransformer(config, towers.embed_dim))
    results = export(Checkpoint(tower, None, None, "test", {}), "timm", tmp_path / "out")
    assert len(results) == 2
    assert all(result.passed for result in results)


def test_timm_without_a_head_and_at_another_resolution(checkpoint, tmp_path) -> None:
    torch.manual_seed(0)
    alone = Checkpoint(stirred(VisionTransformer(CONFIG.vision, None)), None, None, "test", {})
    assert all(result.passed for result in export(alone, "timm", tmp_path / "alone"))
    options = ExportOptions(resolution=64)
    assert all(result.passed for result in export(checkpoint, "timm", tmp_path / "larger", options))


def test_our_folder_for_open_clip_comes_back(checkpoint, tmp_path) -> None:
    export(checkpoint, "open_clip", tmp_path / "out")
    back = openvision.load(tmp_path / "out")
    images = torch.randn(2, 3, 44, 44)
    with torch.inference_mode():
        assert torch.equal(back.vision(images), checkpoint.vision(images))
    assert checkpoint.tokenizer is not None
    assert np.array_equal(back.tokenizer.encode(["two dogs"], 12), checkpoint.tokenizer.encode(["two dogs"], 12))


def test_preprocessing_of_open_clip_is_ours_up_to_rounding(checkpoint, tmp_path) -> None:
    import open_clip

    export(checkpoint, "open_clip", tmp_path / "out")
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
    ours = normalize(openvision.load(tmp_path / "out").prepare(pixels)[None])[0]
    theirs = preprocess(Image.fromarray(pixels))
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 1.5 / 255 / 0.22


@pytest.mark.parametrize("nested", [True, False])
def test_the_golden_tree_as_orbax_writes_it(tmp_path, nested) -> None:
    with np.load(GOLDEN) as archive:
        flat = {name.removeprefix("param:"): archive[name] for name in archive.files if name.startswith("param:")}
        images, zimg = torch.from_numpy(archive["image_nhwc"]).permute(0, 3, 1, 2), archive["zimg"]
    tree: dict = {}
    for name, array in flat.items():
        *branches, leaf = name.split("/")
        place = tree
        for branch in branches:
            place = place.setdefault(branch, {})
        # One axis a head, as newer trees have it: it also says how many heads there are.
        if branches[-1:] != ["out"] and branches[-2:-1] == ["MultiHeadDotProductAttention_0"]:
            heads = 3 if name.startswith("img/") else 2
            array = array.reshape(*array.shape[:-1], heads, -1)
        place[leaf] = array
    content = {"params": tree, "opt": {"count": np.array(3)}} if nested else tree
    path = tmp_path / "checkpoint.npz"
    with orbax.checkpoint.PyTreeCheckpointer() as writer:
        writer.save(path, content)
    loaded = load_checkpoint(path, Request(image_size=32))
    assert loaded.model is not None
    assert loaded.model.decoder is not None
    with torch.inference_mode():
        assert np.abs(loaded.model.encode_image(images).numpy() - zimg).max() < 1e-5

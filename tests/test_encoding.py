"""Encoding: out of memory is one sentence that names the batch, the resolution and the remedy."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.shards.dataset import ShardDataset
from openvision.encoding import encode_images, generate_captions, write_captions
from openvision.errors import OpenVisionError
from openvision.models.vision import VisionTransformer
from openvision.training.validation import validate
from openvision.weights.load import load_checkpoint


def hungry(*_: object, **__: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def checkpoint(tiny_run, monkeypatch):
    """A trained model whose vision tower has no memory to run in."""
    loaded = load_checkpoint(tiny_run / "model")
    monkeypatch.setattr(VisionTransformer, "embed", hungry)
    return loaded


IMAGES = torch.zeros(10, 3, 32, 24, dtype=torch.uint8)


def test_the_batch_of_images_is_named(checkpoint):
    message = r"out of memory on cpu \(.* GiB\) with 8 images of 32 x 24 px at a time; use smaller batches, e\.g\. "
    with pytest.raises(OpenVisionError, match=message + "--batch-size 2"):
        encode_images(checkpoint.model, IMAGES, 8)
    with pytest.raises(OpenVisionError, match=message + "--batch-size 2"):
        generate_captions(checkpoint.model, checkpoint.tokenizer, IMAGES, [""] * 10, 8)
    captioner = SimpleNamespace(
        generate=hungry, parameters=checkpoint.model.parameters, eval=list, train=id, training=False
    )
    with pytest.raises(OpenVisionError, match=message + "--batch-size 2"):
        write_captions(captioner, checkpoint.tokenizer, IMAGES, 8)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OpenVisionError, match="with 1 images of 32 x 24 px at a time; use a lower resolution"):
        encode_images(checkpoint.model, IMAGES, 1)


def test_other_errors_keep_their_traceback(checkpoint, monkeypatch):
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(VisionTransformer, "embed", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        encode_images(checkpoint.model, IMAGES)


def test_validation_names_what_a_run_can_change(checkpoint, shapes_folder):
    with pytest.raises(OpenVisionError, match=r"16 images of 32 x 32 px at a time; leave data\.validation"):
        validate(checkpoint.model, checkpoint.tokenizer, ShardDataset(shapes_folder / "validation"), 32)


@pytest.mark.parametrize("command", ["encode", "eval"])
def test_commands_name_their_option(checkpoint, command, tiny_run, shapes_folder, tmp_path):
    for name in "ab":
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    suite = tmp_path / "suite.toml"
    suite.write_text('[[evaluate]]\nkind = "zero_shot"\ndata = "validation"\nlabel = "name"\n')
    model = str(tiny_run / "model")
    words = {
        "encode": ["encode", str(tmp_path), "-o", str(tmp_path / "x.safetensors"), "--checkpoint", model],
        "eval": ["eval", model, "--suite", str(suite), "--data", str(shapes_folder), "-o", str(tmp_path / "out")],
    }
    done = CliRunner().invoke(app, words[command])
    assert isinstance(done.exception, OpenVisionError)
    assert "images of 32 x 32 px at a time; use smaller batches, e.g. --batch-size" in str(done.exception)

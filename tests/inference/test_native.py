"""Images of any shape keep their aspect when a model is asked to."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.inference.vision import UnreadableImageError
from tests.images.test_native import encoded


@pytest.fixture
def pictures(tmp_path):
    sizes = [(40, 160), (50, 50), (160, 40), (45, 44), (30, 120)]
    paths = []
    for number, size in enumerate(sizes):
        paths.append(tmp_path / "images" / f"{number}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(encoded(*size, "PNG"))
    return paths


def test_each_image_has_its_own_shape_and_place(tiny_run, pictures):
    encoder = openvision.load(tiny_run, preprocessing="native")
    assert [tuple(encoder.preprocess(path).shape[1:]) for path in pictures] == [
        (16, 64),
        (32, 32),
        (64, 16),
        (32, 32),
        (16, 64),
    ]
    together = encoder.encode_images(pictures, batch_size=2)
    alone = torch.cat([encoder.encode_images([path]) for path in pictures])
    torch.testing.assert_close(together, alone)
    square = openvision.load(tiny_run).encode_images(pictures)
    torch.testing.assert_close(together[[1, 3]], square[[1, 3]], msg="a square is what it was")
    assert not torch.allclose(together[0], square[0])
    assert encoder.forward_features([pictures[0]]).grid == (2, 8)
    with pytest.raises(OpenVisionError, match="the images have 3 native shapes, and a batch has one"):
        encoder.preprocess_all(pictures)


def test_beyond_the_largest_bucket(tiny_run):
    encoder = openvision.load(tiny_run, preprocessing="native")
    with pytest.raises(UnreadableImageError, match="beyond the largest bucket, whose sides are 4 to 1"):
        encoder.encode_images([np.zeros((20, 500, 3), dtype=np.uint8)])
    with pytest.raises(UnreadableImageError, match="sides are 1 to 4"):
        encoder.encode_images([Image.new("RGB", (20, 500))])


def test_commands(tiny_run, pictures, tmp_path):
    run = CliRunner().invoke
    chosen = ["--model", str(tiny_run), "--device", "cpu", "--native"]
    output = tmp_path / "features.safetensors"
    done = run(app, ["encode", str(pictures[0].parent), "-o", str(output), *chosen])
    assert done.exit_code == 0, done.output
    from openvision.inference.embed import read_features

    names, features = read_features(output)
    assert names == [path.name for path in pictures]
    torch.testing.assert_close(features, openvision.load(tiny_run, preprocessing="native").encode_images(pictures))
    assert run(app, ["classify", str(pictures[0]), "--labels", "a,b", *chosen]).exit_code == 0
    found = run(app, ["search", str(pictures[0].parent), "red", *chosen])
    assert found.exit_code == 0
    assert sum(".png" in line for line in found.stdout.splitlines()) == 5, found.output
    both = run(app, ["classify", str(pictures[0]), "--labels", "a,b", *chosen, "--squash"])
    assert "--squash changes the aspect and --native keeps it" in str(both.exception)

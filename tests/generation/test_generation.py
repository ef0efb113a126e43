"""Our own autoencoder learns, and a generator learns tokens that its encoder decodes; both from the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.app import app
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ShardImages
from openvision.frozen.autoencoder import as_signed, open_autoencoder
from openvision.frozen.config import AutoencoderConfig
from openvision.generation.autoencoder import AutoencoderTraining, train_autoencoder
from openvision.generation.generate import open_generator
from openvision.generation.generator import Generator, GeneratorConfig, shifted
from openvision.generation.train_generator import GeneratorTraining, train_generator
from openvision.images.preprocess import prepare, to_batch
from openvision.models.openvision3 import OpenVision3, OpenVision3Config
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from tests.training.small_step import recipe_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The model folder of an untrained OpenVision 3 model."""
    torch.manual_seed(0)
    config = recipe_of("openvision3").model
    assert isinstance(config, OpenVision3Config)
    folder = tmp_path_factory.mktemp("encoder") / "model"
    save_folder(folder, OpenVision3(config), Tokenizer.train(["a red square", "a blue bar"], 40), "", {})
    return folder


@pytest.fixture(scope="module")
def generator(encoder, shapes_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator") / "generator"
    losses = []
    training = GeneratorTraining("name", steps=30, batch_size=8, learning_rate=3e-3)
    train_generator(str(encoder), shapes_folder / "train", folder, training, CPU, lambda _, loss: losses.append(loss))
    return folder, losses


def test_the_autoencoder_learns_and_has_latents_of_unit_spread(shapes_folder, tmp_path):
    losses = []
    training = AutoencoderTraining(resolution=16, steps=25, batch_size=4)
    train_autoencoder(shapes_folder / "train", tmp_path / "ae", training, CPU, lambda _, loss: losses.append(loss))
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:3])
    written = json.loads((tmp_path / "ae" / "config.json").read_text())
    autoencoder = open_autoencoder(AutoencoderConfig("conv", str(tmp_path / "ae"), scale=written["scale"]))
    latents = autoencoder.encode(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8))
    assert latents.shape == (4, 16, 2, 2)
    train = ShardImages(shapes_folder / "train").images()
    images = to_batch([prepare(train.load(row), 16) for row in range(16)])
    with torch.no_grad():
        assert autoencoder.encode(images).std().item() == pytest.approx(1, abs=0.2)
        decoded = (autoencoder.decode(autoencoder.encode(images)) - as_signed(images)).abs().mean().item()
    assert decoded == pytest.approx(written["training"]["l1"], rel=0.5)
    assert written["training"]["images"] == 16
    with pytest.raises(OpenVisionError, match="exists; choose another place"):
        train_autoencoder(shapes_folder / "train", tmp_path / "ae", training, CPU)


def test_the_autoencoder_of_another_resolution_is_refused():
    with pytest.raises(OpenVisionError, match="resolution 20 does not divide into latents of 8 px"):
        AutoencoderTraining(resolution=20)


def test_a_generator_learns(generator):
    folder, losses = generator
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
    content = json.loads((folder / "config.json").read_text())
    assert content["training"]["images"] == 16
    assert content["generator"]["tokens"] == 16


def test_it_samples_the_distribution_it_was_trained_on():
    """Two points, each named by its condition: samples go where the condition says."""
    torch.manual_seed(0)
    model = Generator(GeneratorConfig(4, 4, 2, width=32, depth=2, mlp_dim=64, heads=2))
    condition = torch.eye(2).repeat(32, 1)
    tokens = (2 * condition[:, :1] - 1)[..., None].expand(-1, 4, 4) + 0.05 * torch.randn(64, 4, 4)
    model.fit(tokens)
    optimizer, random = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(tokens, condition, 0.1, random).backward()
        optimizer.step()
    means = model.sample(torch.eye(2), 20, 1.5, torch.Generator().manual_seed(1)).mean(dim=(1, 2))
    assert means[0] > 0.7
    assert means[1] < -0.7


def test_the_same_seed_makes_the_same_images(generator, encoder):
    folder, _ = generator
    one, again, other = (
        open_generator(folder, CPU).images(["a red square", "a blue bar"], steps=3, seed=seed) for seed in (0, 0, 1)
    )
    assert one.shape == (2, 32, 32, 3)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert open_generator(folder, CPU, str(encoder)).images(["a"], steps=1).shape == (1, 32, 32, 3)


def test_from_the_command_line(generator, tmp_path):
    folder, _ = generator
    arguments = ["generate", str(folder), "a red square", "a blue bar", "-o", str(tmp_path / "out.png")]
    result = CliRunner().invoke(app, [*arguments, "--steps", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out.png").size == (64, 32)


def test_what_does_not_fit_is_refused(generator, encoder, shapes_folder, tiny_run, tmp_path):
    folder, _ = generator
    with pytest.raises(OpenVisionError, match="needs the model folder of an OpenVision 3 run"):
        train_generator(str(tiny_run), shapes_folder / "train", tmp_path / "g", GeneratorTraining(steps=1), CPU)
    with pytest.raises(OpenVisionError, match="no sample has a 'title'"):
        train_generator(str(encoder), shapes_folder / "train", tmp_path / "g", GeneratorTraining("title"), CPU)
    with pytest.raises(OpenVisionError, match="give a folder that `openvision train-generator` wrote"):
        open_generator(tmp_path, CPU)
    torch.manual_seed(1)
    config = recipe_of("openvision3").model
    assert isinstance(config, OpenVision3Config)
    save_folder(tmp_path / "other", OpenVision3(config), Tokenizer.train(["a red square"], 40), "", {})
    with pytest.raises(OpenVisionError, match="its weights differ"):
        open_generator(folder, CPU, str(tmp_path / "other"))


def test_times_are_moved_towards_noise_and_keep_their_ends():
    times = torch.tensor([0.0, 0.5, 1.0])
    assert shifted(times, 1.0).tolist() == [0.0, 0.5, 1.0]
    assert shifted(times, 3.0).tolist() == [0.0, 0.75, 1.0]
    # 256 tokens of width 768, the paper's: sqrt(196608 / 4096).
    assert GeneratorConfig(256, 768, 512).shift == pytest.approx(48**0.5)

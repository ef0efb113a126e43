"""OpenVision 2 models as folders: saved, loaded, asked for captions, and what they cannot do."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.variants import Sizes
from openvision.models.vision import VisionConfig
from openvision.text.tokenizer import Tokenizer
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.folder import load_any_folder, load_folder, save_folder
from openvision.weights.load import load_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    shape: Sizes = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}
    config = OpenVision2Config(
        VisionConfig(**shape, patch_size=8, image_size=32),
        AutoregressiveDecoderConfig(32, 2, 64, 2, vocab_size=120, caption_length=9, text_positions="learned"),
        keep_ratio=0.5,
    )
    tokenizer = Tokenizer.train(["a red picture of something green and blue"], 120)
    folder = tmp_path_factory.mktemp("v2") / "model"
    save_folder(folder, OpenVision2(config), tokenizer, "", {"samples_seen": 3})
    return folder


def test_a_folder_gives_the_model_back(folder):
    model, tokenizer, provenance = load_any_folder(folder)
    assert isinstance(model, OpenVision2)
    assert not model.training
    assert (model.config.keep_ratio, model.config.decoder.text_positions) == (0.5, "learned")
    assert tokenizer.vocab_size <= 120
    assert provenance == {"samples_seen": 3}


def test_captions_do_not_depend_on_the_batch(folder, pictures):
    captioner = openvision.load_captioner(folder)
    paths = sorted(pictures.rglob("*.png"))
    together = captioner.caption(paths, batch_size=3)
    assert together == [captioner.caption([path])[0] for path in paths]
    assert all(len(captioner.tokenizer.tokens([text])[0]) <= 9 for text in together)
    assert captioner.caption([]) == []
    assert captioner.forward_features(paths).patch_tokens.shape == (3, 16, 32)


def test_images_of_several_shapes_are_captioned_natively(folder, tmp_path):
    captioner = openvision.load_captioner(folder, preprocessing="native")
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, size in zip(paths, [(80, 40), (40, 40), (80, 40)], strict=True):
        pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    assert len({tuple(captioner.preprocess(path).shape) for path in paths}) == 2
    together = captioner.caption(paths)
    assert together == [captioner.caption([path])[0] for path in paths]
    done = CliRunner().invoke(app, ["caption", *map(str, paths), "--model", str(folder), "--native", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [f"{path}\t{text}" for path, text in zip(paths, together, strict=True)]


def test_what_has_no_text_tower_says_so(folder):
    with pytest.raises(OpenVisionError, match=r"or caption with openvision\.load_captioner"):
        openvision.load(folder)
    with pytest.raises(OpenVisionError, match="only captions and has no text tower"):
        load_folder(folder)
    assert openvision.load_vision(folder).num_patches == 16


def test_what_has_no_autoregressive_decoder_says_so(model_folder):
    with pytest.raises(OpenVisionError, match="has no autoregressive caption decoder"):
        openvision.load_captioner(model_folder)


@pytest.mark.parametrize("resolution", [None, 48])
def test_our_own_form_keeps_the_decoder(folder, tmp_path, resolution):
    export(load_checkpoint(folder), "safetensors", tmp_path / "copy", ExportOptions(resolution=resolution))
    original, copy = load_any_folder(folder)[0], load_any_folder(tmp_path / "copy")[0]
    assert copy.config.vision.image_size == (resolution or 32)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, copy.state_dict()[name]), name


def test_a_larger_vocabulary_than_the_model_is_refused(folder, tmp_path):
    model, _, _ = load_any_folder(folder)
    large = Tokenizer.train([f"word{chr(97 + i)}{chr(97 + j)} other" for i in range(26) for j in range(26)], 300)
    save_folder(tmp_path / "model", model, large, "", {})
    with pytest.raises(OpenVisionError, match="entries, the model only 120"):
        load_any_folder(tmp_path / "model")


def test_commands(folder, pictures):
    run = CliRunner().invoke
    told = run(app, ["info", str(folder)])
    assert told.exit_code == 0, told.output
    assert "2 blocks of width 32" in told.output
    assert "9 ids, causal" in told.output
    path = str(pictures / "red.png")
    written = run(app, ["caption", path, "--checkpoint", str(folder), "--max-length", "4"])
    assert written.output.startswith(f"{path}\t")
    refused = run(app, ["caption", path, "--checkpoint", str(folder), "--max-length", "0"])
    assert "at least 1 token" in str(refused.exception)

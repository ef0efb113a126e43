"""The demo without its page: what a checkpoint can do, what is searched, and what the command refuses."""

import socket
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.demo.chat import DemoChat
from openvision.demo.checkpoint import DemoCheckpoint, load_demo
from openvision.demo.collection import open_collection
from openvision.demo.serve import check_port
from openvision.errors import OpenVisionError
from openvision.inference.captioner import Captioner
from openvision.inference.load import load_captioner
from openvision.inference.patch_maps import overlay, patch_pca, shown, text_map
from openvision.inference.vector_folder import encode_folder
from openvision.inference.vision import VisionEncoder
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.openvision3 import OpenVision3, OpenVision3Config
from openvision.multimodal.model.generate import Assistant, Decoding, Prompt
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from tests.training.small_step import recipe_of


def test_what_a_checkpoint_can_do(both, shapes_images):
    able, plain = both
    image = shapes_images / "red-bar.png"
    assert (able.name, plain.name) == ("tiny", "tiny (2)")
    shares = able.classify(image, ["red", "blue"])
    assert shares.keys() == {"red", "blue"}
    assert sum(shares.values()) == pytest.approx(1)
    assert isinstance(able.caption(image, "a red bar"), str)
    assert able.caption(image, "a red bar") == able.caption(image, "a red bar")
    with pytest.raises(OpenVisionError, match=r"tiny \(2\) cannot caption: it has no caption decoder"):
        plain.caption(image, "a red bar")
    with pytest.raises(OpenVisionError, match="write a few words"):
        able.caption(image, " ")
    with pytest.raises(OpenVisionError, match="the query is empty"):
        able.text_vector(" ")


def test_a_captioner_has_no_text_tower(able, shapes_images):
    vision = able.encoder.vision.config
    decoder = AutoregressiveDecoderConfig(width=32, depth=1, mlp_dim=64, heads=2, vocab_size=128, caption_length=8)
    torch.manual_seed(0)
    one = DemoCheckpoint("two", Captioner(OpenVision2(OpenVision2Config(vision, decoder)), able.encoder.tokenizer))
    image = shapes_images / "red-bar.png"
    assert isinstance(one.caption(image, ""), str)
    assert one.patch_pca(image).shape[2] == 3
    assert one.image_vector(image).shape == (32,)
    for refused in (
        lambda: one.text_vector("red"),
        lambda: one.classify(image, ["a"]),
        lambda: one.text_map(image, "a"),
    ):
        with pytest.raises(OpenVisionError, match="two has no text tower, so it cannot"):
            refused()


def test_openvision_3_does_everything_and_captions_without_an_alt_text(able, shapes_images, tmp_path):
    config = recipe_of("openvision3").model
    assert isinstance(config, OpenVision3Config)
    torch.manual_seed(0)
    save_folder(tmp_path / "three", OpenVision3(config), Tokenizer.train(["a red bar"], 40), "", {})
    one, image = load_demo(str(tmp_path / "three"), torch.device("cpu")), shapes_images / "red-bar.png"
    assert one.caption(image, "") == load_captioner(tmp_path / "three").caption([image])[0]
    assert one.classify(image, ["red", "blue"]).keys() == {"red", "blue"}
    assert one.text_map(image, "red").shape == one.patch_pca(image).shape


def test_a_text_map_is_the_cosine_of_projected_patches(able, shapes_images):
    encoder, image = able.encoder, shapes_images / "blue-corner.png"
    cosines = text_map(encoder, image, "a blue corner")
    assert cosines.shape == encoder.grid
    tokens = encoder.forward_features([image]).patch_tokens[0]
    vectors = encoder.vision.project(encoder.vision.fc_norm(tokens))
    expected = torch.nn.functional.cosine_similarity(vectors, encoder.encode_texts(["a blue corner"]), dim=-1)
    assert np.allclose(cosines.reshape(-1), expected.detach().numpy(), atol=1e-5)
    with pytest.raises(OpenVisionError, match="the text is empty"):
        text_map(encoder, image, " ")


def test_the_overlay_is_bright_where_the_cosine_is_large():
    cosines = np.zeros((4, 4), dtype=np.float32)
    cosines[1, 2] = 1
    pixels = overlay(np.full((32, 32, 3), 100, dtype=np.uint8), cosines)
    assert pixels.shape == (32, 32, 3)
    assert np.unravel_index(pixels[..., 0].argmax(), (32, 32))[0] // 8 == 1
    assert np.unravel_index(pixels[..., 0].argmax(), (32, 32))[1] // 8 == 2
    # One value for all patches divides by nothing.
    assert np.isfinite(overlay(pixels, np.ones((4, 4), dtype=np.float32))).all()


def test_main_components_are_colours_of_the_patches(able, shapes_images):
    encoder, image = able.encoder, shapes_images / "blue-corner.png"
    colours = patch_pca(encoder, image)
    assert colours.shape == (*encoder.grid, 3)
    assert colours.reshape(-1, 3).min(axis=0).tolist() == [0, 0, 0]
    assert colours.reshape(-1, 3).max(axis=0).tolist() == [255, 255, 255]
    # The first component tells the shape from the white around it.
    red = colours[..., 0].astype(int)
    pixels = shown(encoder, image)
    dark = pixels.reshape(4, 8, 4, 8, 3).mean((1, 3, 4)) < 200
    assert abs(red[dark].mean() - red[~dark].mean()) > 64


def test_images_are_encoded_once_for_each_checkpoint(both, shapes_images, tmp_path):
    told: list[tuple[int, int]] = []
    collection = open_collection(shapes_images, both, lambda *done: told.append(done), tmp_path)
    assert told[-1] == (16, 16)
    assert len(list(tmp_path.iterdir())) == 2
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    again = open_collection(shapes_images, both, None, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == written
    vector = both[0].image_vector(shapes_images / "blue-corner.png")
    (image, hit), *rest = again.search(0, vector, 3)
    assert (hit.name, hit.cosine) == ("blue-corner.png", pytest.approx(1, abs=1e-5))
    assert (image.size, len(rest)) == ((32, 32), 2)
    assert len(collection.first(5)) == 5


def test_images_that_have_gone_are_left_out(able, shapes_images, tmp_path):
    import shutil

    folder = shutil.copytree(shapes_images, tmp_path / "images")
    collection = open_collection(folder, [able], None, tmp_path / "cache")
    vector = able.image_vector(folder / "red-bar.png")
    (folder / "red-bar.png").unlink()
    found = [hit.name for _, hit in collection.search(0, vector, 16)]
    assert len(found) == 15
    assert "red-bar.png" not in found


def test_shards_and_vectors(able, both, shapes_images, shapes_folder, tmp_path):
    shards = open_collection(shapes_folder / "train", [able], None, tmp_path / "cache")
    assert shards.search(0, able.text_vector("a red bar"), 2)[0][0].size == (32, 32)
    encode_folder(able.encoder, shapes_images, tmp_path / "vectors")
    vectors = open_collection(tmp_path / "vectors", [able])
    assert len(vectors.search(0, able.text_vector("a red bar"), 4)) == 4
    with pytest.raises(OpenVisionError, match="vectors of another checkpoint"):
        open_collection(tmp_path / "vectors", both)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpenVisionError, match="has no images"):
        open_collection(tmp_path / "empty", [able])


def test_a_vision_tower_alone_searches_by_image(able, shapes_images, tmp_path):
    tower = DemoCheckpoint("tower", VisionEncoder(able.encoder.vision))
    collection = open_collection(shapes_images, [tower], None, tmp_path)
    assert collection.search(0, tower.image_vector(shapes_images / "red-bar.png"), 1)[0][1].name == "red-bar.png"


def test_a_port_in_use_is_one_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OpenVisionError, match=f"port {port} cannot be opened: .*; give another one with --port"):
            check_port(port)
    check_port(port)


def test_the_command_needs_its_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["demo"])
    assert isinstance(done.exception, OpenVisionError)
    assert "openvision-encoders[demo]" in str(done.exception)


class Echo:
    """An assistant that says how many turns it heard before the question."""

    def stream(self, prompt: Prompt, decoding: Decoding) -> Iterator[str]:
        assert [image.mode for image in prompt.images] == ["RGB"]
        yield f"{len(prompt.history)} "
        yield prompt.text


def test_a_chat_goes_on_until_the_image_changes(shapes_images):
    chat = DemoChat("echo", cast(Assistant, Echo()))
    one, other = shapes_images / "red-bar.png", shapes_images / "blue-corner.png"
    grown = [found.turns[-1].text for found in chat.ask(None, one, " what? ")]
    assert grown == ["0", "0 what?", "0 what?"]
    *_, first = chat.ask(None, one, "what?")
    *_, second = chat.ask(first, one, "and?")
    assert [turn.text for turn in second.turns] == ["what?", "0 what?", "and?", "2 and?"]
    *_, new = chat.ask(second, other, "and here?")
    assert [turn.text for turn in new.turns] == ["and here?", "0 and here?"]
    with pytest.raises(OpenVisionError, match="the question is empty"):
        next(chat.ask(None, one, " "))
    with pytest.raises(OpenVisionError, match=r"nowhere\.png"):
        next(chat.ask(None, shapes_images / "nowhere.png", "what?"))

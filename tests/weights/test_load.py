"""Every way a checkpoint comes in, and every way it can be wrong."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from safetensors.torch import save_file

import openvision
from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.models.layers import sincos_position_table
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.text.tokenizer import Tokenizer
from openvision.weights import hub
from openvision.weights.folder import save_folder
from openvision.weights.load import Request, load_checkpoint, vision_shape
from openvision.weights.open_clip import CONFIG_FILE, config_to_open_clip, from_open_clip, to_open_clip
from openvision.weights.registry import released
from tests.released import random_state, released_shapes, vision_shapes

# Width and depth of Ti, so that the tensors alone say how many heads there are.
CONFIG = OpenVisionConfig(
    embed_dim=32,
    vision=VisionConfig(width=192, depth=12, mlp_dim=64, heads=3, patch_size=8, image_size=32),
    text=TextConfig(width=192, depth=12, mlp_dim=64, heads=3, vocab_size=200, context_length=12),
)
GOLDEN = Path(__file__).parents[1] / "golden" / "openvision_tiny.npz"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return random_state(released_shapes(CONFIG))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def golden_tree() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as archive:
        return {name.removeprefix("param:"): archive[name] for name in archive.files if name.startswith("param:")}


def model_of(state) -> OpenVision:
    model = OpenVision(CONFIG)
    model.load_state_dict(from_open_clip(state, "test"))
    return model.eval()


def test_names_there_and_back(state) -> None:
    ours = from_open_clip(state, "test")
    assert ours.keys() == OpenVision(CONFIG).state_dict().keys()
    back = to_open_clip(ours, CONFIG)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("with_config", [True, False])
def test_released_layout_from_a_file(state, images, tmp_path, suffix, with_config) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    if with_config:
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(CONFIG)))
    loaded = load_checkpoint(path)
    assert loaded.model is not None
    assert loaded.model.config == CONFIG
    assert torch.equal(loaded.model.encode_image(images), model_of(state).encode_image(images))


def test_a_training_checkpoint_of_open_clip(state, images, tmp_path) -> None:
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(wrapped, tmp_path / "epoch_3.pt")
    tower = load_checkpoint(tmp_path / "epoch_3.pt", Request(vision_only=True)).vision
    assert torch.equal(tower(images), model_of(state).vision(images))


def test_a_released_folder_with_its_vocabulary(state, tmp_path) -> None:
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(CONFIG)))
    trained = Tokenizer.train(["a red circle", "two dogs"], 60)
    trained.save(tmp_path)
    encoder = openvision.load(tmp_path)
    assert np.array_equal(encoder.tokenizer.encode(["a red dog"], 12), trained.encode(["a red dog"], 12))
    assert encoder.encode_texts(["a red dog"]).shape == (1, 32)


def test_without_a_vocabulary_pictures_can_be_encoded_and_texts_say_what_is_missing(state, tmp_path) -> None:
    save_file(state, tmp_path / "weights.safetensors")
    encoder = openvision.load(tmp_path / "weights.safetensors")
    picture = np.zeros((20, 30, 3), dtype=np.uint8)
    assert encoder.encode_images([picture]).shape == (1, 32)
    with pytest.raises(OpenVisionError, match="vocabulary"):
        encoder.encode_texts(["a dog"])


def test_a_run_is_a_source_like_any_other(state, images, tmp_path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.toml").write_text("")
    with pytest.raises(OpenVisionError, match=r"run that has not finished, .* openvision checkpoint export .*/run -o"):
        load_checkpoint(run)
    save_folder(run / "model", model_of(state), Tokenizer.train(["a red circle"], 60), "", {})
    assert torch.equal(openvision.load(run).vision(images), model_of(state).vision(images))
    assert vision_shape(run) == CONFIG.vision
    name = "openvision-vit-tiny-patch16-160"
    assert vision_shape(name) == released(name).vision


@pytest.mark.parametrize(
    "name", ["encode", "classify", "search", "caption", "info", "convert", "export", "verify", "eval", "vlm build"]
)
def test_every_command_says_the_same_of_its_model(name) -> None:
    command: Any = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]
    helps = [parameter.help or "" for parameter in command.params if "MODEL" in (parameter.metavar or "")]
    assert [text.startswith("Run, model folder, released name, Hub id, or weights file") for text in helps] == [True]


def test_a_vision_tower_alone(images, tmp_path) -> None:
    state = random_state(vision_shapes(CONFIG.vision, 32))
    torch.save(state, tmp_path / "tower.bin")
    encoder = openvision.load_vision(tmp_path / "tower.bin")
    assert encoder.vision.config == CONFIG.vision
    features = encoder.forward_features(images, layers=[-2])
    assert features.layers[0].patch_tokens.shape == (2, 16, 192)
    with pytest.raises(OpenVisionError, match="without a text tower"):
        openvision.load(tmp_path / "tower.bin")


def test_half_precision_files_become_float32(state, images, tmp_path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "half.safetensors")
    tower = load_checkpoint(tmp_path / "half.safetensors").vision
    assert tower.cls_token.dtype == torch.float32
    assert torch.cosine_similarity(tower(images), model_of(state).vision(images)).min() > 0.999


def split(name: str, array: np.ndarray) -> np.ndarray:
    """An array of the golden tree with one axis a head, as newer trees have it."""
    heads = 3 if name.startswith("img/") else 2
    if "/out/kernel" in name:
        return array.reshape(heads, -1, array.shape[-1])
    if any(f"/{part}/" in name for part in ("query", "key", "value")):
        return array.reshape(*array.shape[:-1], heads, -1)
    return array


def test_heads_are_never_guessed(golden_tree, state, tmp_path) -> None:
    # The tiny golden model has three heads of 8 and two of 16, which no table of sizes knows.
    np.savez(tmp_path / "tree.npz", **golden_tree)  # pyright: ignore[reportArgumentType]
    for request in (Request(image_size=32), Request(image_size=32, vision_only=True)):
        with pytest.raises(
            OpenVisionError, match=r"tree\.npz: no released size has a tower of width (24|32) and depth 2"
        ):
            load_checkpoint(tmp_path / "tree.npz", request)
    cut = {name: tensor for name, tensor in state.items() if ".resblocks.11." not in name}
    save_file(cut, tmp_path / "weights.safetensors")
    for request in (Request(), Request(vision_only=True)):
        with pytest.raises(OpenVisionError, match=r"weights\.safetensors: no released size .* width 192 and depth 11"):
            load_checkpoint(tmp_path / "weights.safetensors", request)
    shallow = replace(CONFIG, vision=replace(CONFIG.vision, depth=11, heads=6), text=replace(CONFIG.text, depth=11))
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(shallow)))
    assert load_checkpoint(tmp_path / "weights.safetensors").vision.config.heads == 6


def test_a_tree_with_a_head_axis_is_the_same_model(golden_tree, tmp_path) -> None:
    with np.load(GOLDEN) as archive:
        images, ids = torch.from_numpy(archive["image_nhwc"]).permute(0, 3, 1, 2), torch.from_numpy(archive["labels1"])
        zimg, ztxt, logits = archive["zimg"], archive["ztxt"], archive["eval_logits"]
    tree = {f"params/{name}": split(name, array) for name, array in golden_tree.items()}
    np.savez(tmp_path / "tree.npz", **tree)  # pyright: ignore[reportArgumentType]
    model = load_checkpoint(tmp_path / "tree.npz", Request(image_size=32)).model
    assert model is not None
    with torch.inference_mode():
        assert np.abs(model.encode_image(images).numpy() - zimg).max() < 1e-5
        assert np.abs(model.encode_text(ids.long()).numpy() - ztxt[: len(ids)]).max() < 1e-5
        assert np.abs(model.caption_logits(images, ids.long()).numpy() - logits).max() < 1e-4


def test_openvision2_trees_give_the_vision_tower(golden_tree, tmp_path) -> None:
    tower = {
        name.replace("img/", "img_encoder/", 1): split(name, array)
        for name, array in golden_tree.items()
        if name.startswith("img/") and "head" not in name
    }
    np.savez(tmp_path / "tree.npz", **tower)  # pyright: ignore[reportArgumentType]
    encoder = openvision.load_vision(tmp_path / "tree.npz", image_size=32)
    assert encoder.vision.head is None
    with pytest.raises(OpenVisionError, match="no projection head"):
        encoder.encode_images([np.zeros((8, 8, 3), dtype=np.uint8)])


def test_our_folder_whole_and_vision_alone(state, images, tmp_path) -> None:
    model, tokenizer = model_of(state), Tokenizer.train(["a dog"], 50)
    save_folder(tmp_path / "whole", model, tokenizer, "", {"seed": 1})
    save_folder(tmp_path / "vision", model.vision, None, "", {})
    whole = load_checkpoint(tmp_path / "whole")
    assert whole.model is not None
    assert whole.provenance == {"seed": 1}
    for source, request in (("whole", Request(vision_only=True)), ("vision", Request())):
        loaded = load_checkpoint(tmp_path / source, request)
        assert loaded.model is None
        assert torch.equal(loaded.vision(images), model.vision(images))


@pytest.mark.parametrize("resolution", [16, 40, (24, 56)])
def test_another_resolution_recomputes_positions(state, tmp_path, resolution) -> None:
    save_file(state, tmp_path / "weights.safetensors")
    encoder = openvision.load_vision(tmp_path / "weights.safetensors", resolution=resolution)
    rows, columns = encoder.grid
    picture = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    features = encoder.forward_features([picture])
    assert features.grid == (rows, columns)
    assert features.patch_tokens.shape == (1, rows * columns, 192)
    table = encoder.vision.position_table(rows, columns, torch.device("cpu"))
    assert torch.equal(table, sincos_position_table(rows, columns, 192))


# The Hub: what is asked for, and what is made of the answer. No network is used.


@pytest.fixture
def repository(state, tmp_path, monkeypatch) -> list[tuple[str, tuple[str, ...], dict]]:
    """A stand-in for the Hub with one repository; yields what was asked for."""
    root = tmp_path / "hub"
    root.mkdir()
    torch.save(state, root / "open_clip_pytorch_model.bin")
    (root / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(CONFIG)))
    asked = []

    def fetch(name, files, revision=None, offline=False):
        asked.append((name, files, {"revision": revision, "offline": offline}))
        return next(root / file for file in files if (root / file).is_file())

    monkeypatch.setattr(hub, "fetch", fetch)
    return asked


def test_a_hub_id_with_a_revision(repository) -> None:
    loaded = load_checkpoint("somebody/model", Request(revision="abc", offline=True))
    assert loaded.model is not None
    assert loaded.model.config == CONFIG
    assert {name for name, _, _ in repository} == {"somebody/model"}
    assert all(settings == {"revision": "abc", "offline": True} for _, _, settings in repository)


def test_a_released_name_that_holds_another_model_is_refused(repository) -> None:
    with pytest.raises(OpenVisionError, match="but openvision-vit-tiny-patch16-160 is"):
        load_checkpoint("openvision-vit-tiny-patch16-160", Request(vision_only=True))


def test_openvision2_by_name_has_no_head(tmp_path, monkeypatch) -> None:
    entry = released("openvision2-vit-large-patch14-224")
    shallow = replace(entry, vision=replace(entry.vision, depth=1))
    monkeypatch.setitem(openvision.weights.registry._ENTRIES, entry.name, shallow)
    torch.save(random_state(vision_shapes(shallow.vision, 1024)), tmp_path / "open_clip_pytorch_model.bin")
    width = {"width": 1024, "layers": 1, "patch_size": 14, "image_size": 224}
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_cfg": {"embed_dim": 1024, "vision_cfg": width}}))
    monkeypatch.setattr(
        hub, "fetch", lambda _, files, **__: next(tmp_path / f for f in files if (tmp_path / f).exists())
    )
    encoder = openvision.load_vision(entry.name)
    assert encoder.vision.head is None
    assert encoder.forward_features(torch.zeros(1, 3, 28, 28)).patch_tokens.shape == (1, 4, 1024)


def test_no_network_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OpenVisionError, match=r"UCSC-VLAA/openvision-vit-tiny-patch16-160 could not be fetched"):
        load_checkpoint("openvision-vit-tiny-patch16-160", Request(offline=True))


# Bad input.


def broken(state, change) -> dict[str, torch.Tensor]:
    state = dict(state)
    change(state)
    return state


def drop(state) -> None:
    del state["visual.transformer.resblocks.1.mlp.c_fc.bias"]


def add(state) -> None:
    state["visual.ln_pre.weight"] = torch.ones(192)


def reshape(state) -> None:
    state["visual.transformer.resblocks.1.ln_1.weight"] = torch.ones(191)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"vision\.blocks\.1\.mlp\.fc1\.bias is missing"),
        (add, r"visual\.ln_pre\.weight is not part of the model"),
        (reshape, r"vision\.blocks\.1\.norm1\.weight is \(191,\) instead of \(192,\)"),
    ],
)
def test_loading_is_strict(state, tmp_path, change, message) -> None:
    save_file(broken(state, change), tmp_path / "weights.safetensors")
    with pytest.raises(OpenVisionError, match=message):
        load_checkpoint(tmp_path / "weights.safetensors")


def test_learned_positions_are_another_family(state, tmp_path) -> None:
    state["visual.positional_embedding"] += 0.1
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(OpenVisionError, match="another family"):
        load_checkpoint(tmp_path / "weights.safetensors")


def test_a_missing_last_block_is_not_a_shallower_model_when_the_configuration_says_so(state, tmp_path) -> None:
    cut = {name: tensor for name, tensor in state.items() if ".resblocks.1." not in name}
    save_file(cut, tmp_path / "open_clip_model.safetensors")
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(CONFIG)))
    with pytest.raises(OpenVisionError, match=r"and 19 more"):
        load_checkpoint(tmp_path)


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harmful"),))


def test_a_pickle_that_is_not_tensors_is_never_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(pickle.dumps(Harmful()))
    torch.save({"model": Harmful()}, tmp_path / "other.pt")
    for name in ("weights.bin", "other.pt"):
        with pytest.raises(OpenVisionError, match="not a file of plain tensors"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "harmful").exists()


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".npz"])
def test_a_truncated_file(state, tmp_path, suffix) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".bin":
        torch.save(state, path)
    else:
        np.savez(path, a=np.zeros(1000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OpenVisionError, match=str(path)):
        load_checkpoint(path, Request(image_size=32))


def test_a_text_model_given_as_vision(state, tmp_path) -> None:
    text = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    save_file(text, tmp_path / "text.safetensors")
    with pytest.raises(OpenVisionError, match="no vision tower"):
        load_checkpoint(tmp_path / "text.safetensors", Request(vision_only=True))
    with pytest.raises(OpenVisionError, match="no vision tower"):
        load_checkpoint(tmp_path / "text.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("openvision-vit-tiny-patch16-161", "did you mean 'openvision-vit-tiny-patch16-160'"),
        ("nowhere/weights.bin", "does not exist"),
        ("./nowhere", "checkpoint ./nowhere does not exist"),
        ("nowhere/model/", "does not exist"),
        ("runs/nowhere", "checkpoint runs/nowhere does not exist; `openvision train` writes one"),
        ("tests/nowhere", "does not exist"),
        (Path("nowhere/model"), "does not exist"),
    ],
)
def test_sources_that_are_nothing(source, message) -> None:
    with pytest.raises(OpenVisionError, match=message):
        load_checkpoint(source)


def test_folders_and_files_of_other_kinds(tmp_path) -> None:
    with pytest.raises(OpenVisionError, match="not a model folder"):
        load_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(OpenVisionError, match="not a weights file"):
        load_checkpoint(tmp_path / "notes.txt")
    (tmp_path / CONFIG_FILE).write_text("{}")
    with pytest.raises(OpenVisionError, match="has no weights"):
        load_checkpoint(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"not a zip")
    with pytest.raises(OpenVisionError, match=r"weights\.pt"):
        load_checkpoint(tmp_path / "weights.pt")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(OpenVisionError, match="img/embedding/kernel is missing"):
        load_checkpoint(tmp_path / "other.npz", Request(vision_only=True, image_size=32))
    with pytest.raises(OpenVisionError, match="image_size"):
        load_checkpoint(tmp_path / "other.npz")

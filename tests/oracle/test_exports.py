"""Exports into stock timm and open_clip, and JAX trees as Orbax writes them."""

# pyright: reportMissingImports=false

import html
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import orbax.checkpoint
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.variants import SIZES
from openvision.models.vision import VisionConfig, VisionTransformer, normalize
from openvision.text.tokenizer import Tokenizer
from openvision.training.setup.start import start_from
from openvision.weights import hub
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.export.text import write_tokenizer
from openvision.weights.jax import from_jax, to_jax
from openvision.weights.load import Checkpoint, Request, load_checkpoint
from openvision.weights.open_clip import CONFIG_FILE, config_to_open_clip
from tests.weights.stock_pixels import cosines

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


@pytest.mark.parametrize("options", [{"registers": 4}, {"pool": "map"}, {"registers": 2, "pool": "map"}])
def test_timm_holds_registers_and_the_attention_pool(tmp_path, options) -> None:
    torch.manual_seed(0)
    vision = stirred(VisionTransformer(replace(CONFIG.vision, **options), 24))
    results = export(Checkpoint(vision, None, None, "test", {}), "timm", tmp_path / "out")
    assert [result.what for result in results] == ["patch tokens", "embedding"]
    assert all(result.passed for result in results)


@pytest.mark.parametrize("target", ["open_clip", "timm", "transformers", "beit"])
def test_the_command_prints_parity(folder, tmp_path, target) -> None:
    result = CliRunner().invoke(app, ["export", str(folder), "--to", target, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "largest difference" in result.output
    assert "TOO LARGE" not in result.output


@pytest.mark.parametrize("size", SIZES)
def test_timm_at_every_size(tmp_path, size) -> None:
    towers = SIZES[size]
    depth = towers.vision.depth if size in ("tiny", "small") else 2
    patch = towers.patches[0]
    config = VisionConfig(**towers.vision.sizes(), patch_size=patch, image_size=4 * patch + 6)
    config = replace(config, depth=depth)
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
    ours = normalize(openvision.load(tmp_path / "out").preprocess(pixels)[None])[0]
    theirs = preprocess(Image.fromarray(pixels))
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 1.5 / 255 / 0.22


def test_what_open_clip_does_not_do_is_measured_and_the_card_does_it(checkpoint, tmp_path) -> None:
    import open_clip

    export(checkpoint, "open_clip", tmp_path / "out")
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    found = cosines(checkpoint, (tmp_path / "out" / "README.md").read_text(), preprocess)
    assert found["opaque"][0] > 0.999
    assert all(found[kind][0] < 0.95 for kind in ("turned", "transparent", "16 bits"))
    assert all(behind > 0.999 for _, behind in found.values())


# What docs/weights.md says of open_clip's tokenizer, which repairs texts with ftfy and html.unescape first.
SAME_IDS = [
    "A DOG, two cats; it's 3 o'clock!",
    "café naïve, straße",
    "你好 fish & chips",
    "full width ＡＢ, ﬁsh",
    "a – b — c …\tx\ny",
    "zero\u200bwidth a\ufffdb a\u2028b \xa0x ² µm",
    "[CLS] a",
]
OTHER_IDS = {
    "entities": ["fish &amp; chips", "5 &lt; 6", "&#39;x&#39;", "a &nbsp; b"],
    "curly quotes": ["it’s a dog", "“dog”", "l‘x"],
    "mojibake": ["itâ€™s a dog", "cafÃ©"],
    "control characters": ["a\x07b", "a\x92b", "a\x85b", "\x1b[31mred\x1b[0m"],
}


@pytest.fixture(scope="module")
def both_tokenizers(tmp_path_factory):
    import open_clip

    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [*SAME_IDS, *(text for kind in OTHER_IDS.values() for text in kind)]
    ours = Tokenizer.train([*texts, *map(html.unescape, texts), "' \"é…€"], 400)
    write_tokenizer(ours, folder, 80)
    text = replace(CONFIG.text, vocab_size=ours.vocab_size, context_length=80)
    (folder / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(replace(CONFIG, text=text))))
    return ours, open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.mark.parametrize("text", SAME_IDS)
def test_texts_whose_ids_are_open_clips(both_tokenizers, text) -> None:
    ours, theirs = both_tokenizers
    assert ours.encode([text]).tolist() == theirs([text]).tolist()


@pytest.mark.parametrize("kind", OTHER_IDS)
def test_texts_that_open_clip_changes_first(both_tokenizers, kind) -> None:
    ours, theirs = both_tokenizers
    for text in OTHER_IDS[kind]:
        assert ours.encode([text]).tolist() != theirs([text]).tolist()


def nested_tree(flat: dict[str, np.ndarray]) -> dict:
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
    return tree


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def golden_tree(golden) -> dict:
    return nested_tree({name.removeprefix("param:"): golden[name] for name in golden if name.startswith("param:")})


def check_golden(loaded: Checkpoint, golden: dict[str, np.ndarray]) -> None:
    assert loaded.model is not None
    assert loaded.model.decoder is not None
    images = torch.from_numpy(golden["image_nhwc"]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        assert np.abs(loaded.model.encode_image(images).numpy() - golden["zimg"]).max() < 1e-5


@pytest.mark.parametrize("nested", [True, False])
def test_the_golden_tree_as_orbax_writes_it(golden, golden_tree, tmp_path, nested) -> None:
    content = {"params": golden_tree, "opt": {"count": np.array(3)}} if nested else golden_tree
    path = tmp_path / "checkpoint.npz"
    with orbax.checkpoint.PyTreeCheckpointer() as writer:
        writer.save(path, content)
    check_golden(load_checkpoint(path, Request(image_size=32)), golden)


@pytest.fixture(scope="module")
def released_folder(golden_tree, tmp_path_factory) -> Path:
    """`jax_orbax_weight` as the original's CheckpointManager writes it, two steps and one that was not finished."""
    root = tmp_path_factory.mktemp("hub") / "jax_orbax_weight"
    older = nested_tree(to_jax({name: 0 * tensor for name, tensor in from_jax(flat(golden_tree)).items()}))
    with orbax.checkpoint.CheckpointManager(root / "checkpoint.npz") as manager:
        for step, tree in ((9, older), (10, golden_tree)):
            manager.save(step, args=orbax.checkpoint.args.StandardSave({"params": tree, "opt": {"count": np.array(3)}}))
        manager.wait_until_finished()
    (root / "checkpoint.npz" / "11.orbax-checkpoint-tmp-5" / "default").mkdir(parents=True)
    return root


def flat(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    leaves: dict[str, np.ndarray] = {}
    for name, branch in tree.items():
        leaves |= flat(branch, f"{prefix}{name}/") if isinstance(branch, dict) else {f"{prefix}{name}": branch}
    return leaves


@pytest.mark.parametrize("level", ["", "checkpoint.npz", "checkpoint.npz/10", "checkpoint.npz/10/default"])
def test_released_trees_open_at_every_level(golden, released_folder, level) -> None:
    check_golden(load_checkpoint(released_folder / level, Request(image_size=32)), golden)


def test_an_older_step_is_taken_when_it_is_named(released_folder) -> None:
    older = load_checkpoint(released_folder / "checkpoint.npz" / "9", Request(image_size=32)).vision
    assert not older.cls_token.any()


def test_the_decoder_from_the_hub(golden, released_folder, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(hub, "fetch_folder", lambda *names, **_: asked.append(names) or released_folder)
    check_golden(load_checkpoint("somebody/model", Request(image_size=32, decoder=True)), golden)
    assert asked == [("somebody/model", "jax_orbax_weight")]


def test_a_run_starts_from_a_released_tree(golden, golden_tree, released_folder) -> None:
    like = load_checkpoint(released_folder, Request(image_size=32)).model
    assert like is not None
    fresh = OpenVision(like.config)
    assert start_from(fresh, str(released_folder)) == ["vision", "text", "decoder", "logit_scale"]
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), like.parameters(), strict=True))


def test_folders_without_a_tree_are_one_sentence(tmp_path) -> None:
    (tmp_path / "checkpoint.npz" / "10.orbax-checkpoint-tmp-5").mkdir(parents=True)
    for place in (tmp_path / "checkpoint.npz", tmp_path):
        with pytest.raises(OpenVisionError, match=r"holds no Orbax checkpoint|is not a model folder"):
            load_checkpoint(place, Request(image_size=32))

"""Exports into stock classes that the main environment has: transformers and ONNX Runtime.

timm and open_clip need torchvision; they are in tests/oracle.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.models.layers import unit
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.variants import SIZES
from openvision.models.vision import VisionConfig, VisionTransformer, normalize
from openvision.text.tokenizer import Tokenizer
from openvision.weights.export import onnx, targets
from openvision.weights.export.onnx import check_onnx, open_session
from openvision.weights.export.onnx_precision import lower
from openvision.weights.export.parity import Parity, compare, require_parity
from openvision.weights.export.targets import TARGETS, ExportOptions, at_resolution, export
from openvision.weights.load import Checkpoint
from openvision.weights.open_clip import mlp_ratio
from tests.weights.stock_pixels import cosines

CONFIG = OpenVisionConfig(
    embed_dim=24,
    vision=VisionConfig(width=48, depth=2, mlp_dim=96, heads=3, patch_size=8, image_size=40),
    text=TextConfig(width=32, depth=1, mlp_dim=64, heads=2, vocab_size=120, context_length=12),
)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    model = stirred(OpenVision(CONFIG))
    tokenizer = Tokenizer.train(["a red circle on white", "two dogs"], 100)
    return Checkpoint(model.vision, model, tokenizer, "test", {})


@pytest.fixture(scope="module", autouse=True)
def _each_graph_is_traced_once() -> Iterator[None]:
    """Precisions start from the same float32 graph of the same tower, whose tracing is nearly all of their time."""
    traced: dict[object, tuple[object, bytes]] = {}
    trace = onnx._export

    def traced_once(graph, example, axes, name, outputs, file: Path) -> None:
        parts = tuple(id(part) for part in graph.children())
        options = {key: value for key, value in vars(graph).items() if isinstance(value, int)}
        key = (type(graph), parts, str(options), example.shape, *axes, *outputs)
        if key not in traced:
            trace(graph, example, axes, name, outputs, file)
            # The graph is kept with its file: another module may not have its address.
            traced[key] = graph, file.read_bytes()
        file.write_bytes(traced[key][1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "_export", traced_once)
        yield


def stirred(model):
    """Random biases and norms too: what is zero or one at the start would hide a lost tensor."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def vision_alone(config: VisionConfig, embed_dim: int | None) -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(stirred(VisionTransformer(config, embed_dim)), None, None, "test", {})


@pytest.mark.parametrize("target", ["safetensors", "transformers", "beit"])
def test_every_target_is_exact_and_has_a_card(checkpoint, tmp_path, target) -> None:
    results = export(checkpoint, target, tmp_path / "out")
    assert results
    assert all(result.passed and result.tolerance <= 2e-5 for result in results)
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(results[0]) in card


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[pytest.mark.slow] if size in ("huge", "giant") else []) for size in SIZES]
)
@pytest.mark.parametrize("target", ["transformers", "beit"])
def test_hidden_states_are_exact_at_every_size(tmp_path, size, target) -> None:
    towers = SIZES[size]
    # Ti and S in full; the others at full width, two blocks deep.
    depth = towers.vision.depth if size in ("tiny", "small") else 2
    patch = towers.patches[0]
    config = VisionConfig(**towers.vision.sizes(), patch_size=patch, image_size=4 * patch + 6)
    config = replace(config, depth=depth)
    results = export(vision_alone(config, towers.embed_dim), target, tmp_path / "out")
    assert all(result.passed for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "large", "so400m", "huge", "giant"])
def test_hidden_states_are_exact_at_full_depth(tmp_path, size) -> None:
    towers = SIZES[size]
    config = VisionConfig(**towers.vision.sizes(), patch_size=14, image_size=84)
    results = export(vision_alone(config, towers.embed_dim), "transformers", tmp_path / "out")
    assert all(result.passed for result in results)


def test_the_tower_inside_llava_reads_our_tokens(checkpoint, tmp_path) -> None:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, ViTConfig, ViTModel

    export(checkpoint, "transformers", tmp_path / "tower")
    llm = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    config = LlavaConfig(
        vision_config=ViTConfig.from_pretrained(tmp_path / "tower"),
        text_config=llm,
        image_token_index=63,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=25,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    tower = ViTModel.from_pretrained(tmp_path / "tower", add_pooling_layer=False)
    missing, unexpected = llava.model.vision_tower.load_state_dict(tower.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("pooler.") for name in missing)
    seen = []
    llava.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, 40, 40)
    ids = torch.tensor([[1] + [63] * 25 + [2]] * 2)
    with torch.inference_mode():
        llava(input_ids=ids, pixel_values=images, attention_mask=torch.ones_like(ids))
        ours = checkpoint.vision.forward_features(images, layers=[-2]).layers[0].patch_tokens
    assert compare("tokens in Llava", ours, seen[0].reshape(ours.shape)).passed


def test_the_embedding_through_norm_and_head_beside_the_vit(checkpoint, tmp_path) -> None:
    from safetensors.torch import load_file
    from transformers import ViTModel

    export(checkpoint, "transformers", tmp_path / "out")
    parts = load_file(tmp_path / "out" / "projection.safetensors")
    tower = ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    images = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        mean = tower(images, output_hidden_states=True).hidden_states[-1][:, 1:].mean(1)
        pooled = torch.nn.functional.layer_norm(mean, (48,), parts["fc_norm.weight"], parts["fc_norm.bias"], 1e-6)
        assert compare("embedding", checkpoint.vision(images), pooled @ parts["head.weight"].T).passed


def test_the_image_processor_prepares_as_we_do(checkpoint, tmp_path) -> None:
    from transformers import AutoImageProcessor

    export(checkpoint, "transformers", tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8).repeat(12, 0).repeat(12, 1)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    encoder = openvision.Encoder(checkpoint.model, None)
    ours = normalize(encoder.preprocess(pixels)[None])
    # They round where training truncated: one grey level, and a few more at the borders of the blocks.
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 1.5 / 255 / 0.22


def test_what_the_stock_processor_does_not_do_is_measured_and_the_card_does_it(checkpoint, tmp_path) -> None:
    from transformers import AutoImageProcessor

    export(checkpoint, "transformers", tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    found = cosines(checkpoint, card, lambda image: processor(image, return_tensors="pt")["pixel_values"][0])
    # 0.89 for a turned image, -0.84 for 16 bits: this processor composites transparency on white, and no more.
    assert found["opaque"][0] > 0.9999
    assert found["transparent"][0] > 0.9999
    assert found["turned"][0] < 0.95
    assert found["16 bits"][0] < 0
    assert all(behind > 0.9999 for _, behind in found.values())


def test_siglip_is_refused_until_the_drift_is_accepted(checkpoint, tmp_path) -> None:
    with pytest.raises(OpenVisionError, match="no class token"):
        export(checkpoint, "siglip", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    results = export(checkpoint, "siglip", tmp_path / "out", ExportOptions(accept_drift=True))
    assert all(result.difference > 0 for result in results)
    assert results[0].difference > 1e-3
    assert "Not the same encoder" in (tmp_path / "out" / "README.md").read_text()


def test_static_int8_has_the_scales_of_the_given_images(checkpoint, graphs, tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    images = torch.randint(0, 255, (9, 3, 40, 40), dtype=torch.uint8)
    # Nothing but grey: what other images reach is clipped.
    grey = torch.full_like(images, 128)
    results = export(checkpoint, "onnx", tmp_path / "good", ExportOptions(precision="int8", calibration=images))
    assert "features of 9 given images, as 1 - cosine" in {result.what for result in results}
    told = json.loads((tmp_path / "good" / "onnx.json").read_text())
    assert (told["precision"], told["calibration_images"]) == ("int8", 9)
    operators = {node.op_type for node in onnx.load(str(tmp_path / "good" / "vision.onnx")).graph.node}
    assert "QuantizeLinear" in operators
    assert "DynamicQuantizeLinear" not in operators
    (tmp_path / "grey").mkdir()
    shutil.copyfile(graphs / "vision.onnx", tmp_path / "grey" / "vision.onnx")
    lower(tmp_path / "grey" / "vision.onnx", "int8", lambda: iter([normalize(grey)]))
    ours = checkpoint.vision.encode_image(normalize(images)).detach()
    turned = {}
    for name in ("good", "grey"):
        session = open_session(tmp_path / name / "vision.onnx")
        (found, *_) = session.run(None, {"images": normalize(images).numpy()})
        turned[name] = 1 - torch.cosine_similarity(torch.from_numpy(found), ours).min().item()
    assert turned["good"] < 0.02
    assert turned["grey"] > 5 * turned["good"]
    with pytest.raises(OpenVisionError, match="--calibration is for ONNX graphs of precision int8"):
        export(checkpoint, "onnx", tmp_path / "no", ExportOptions(calibration=images))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.9999), ("int8", 0.98)])
def test_lower_precision_stays_close_on_given_images_or_is_refused(checkpoint, tmp_path, precision, least) -> None:
    images = torch.randint(0, 255, (5, 3, 40, 40), dtype=torch.uint8)
    results = export(checkpoint, "onnx", tmp_path / "out", ExportOptions(precision=precision, images=images))
    told = {result.what: result for result in results}["features of 5 given images, as 1 - cosine"]
    (embeds,) = open_session(tmp_path / "out" / "vision.onnx").run(
        ["image_embeds"], {"images": normalize(images).numpy()}
    )
    with torch.inference_mode():
        cosine = torch.cosine_similarity(torch.from_numpy(embeds), checkpoint.vision(normalize(images)))
    assert told.difference == pytest.approx(1 - cosine.min().item(), abs=1e-6)
    assert told.tolerance == pytest.approx(1 - least)
    assert cosine.min() > least
    assert json.loads((tmp_path / "out" / "onnx.json").read_text())["precision"] == precision
    if precision == "int8":
        # Eight bits overflow on x86 processors without VNNI, which those who export may not have.
        onnx = pytest.importorskip("onnx")
        weights = [
            onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load(str(tmp_path / "out" / "vision.onnx")).graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8
        ]
        assert max(np.abs(weight.astype(int)).max() for weight in weights if weight.ndim == 2) == 64
    with pytest.raises(OpenVisionError, match=r"5 given images, as 1 - cosine: .* TOO LARGE"):
        require_parity(check_onnx(checkpoint, tmp_path / "out", images, least_cosine=1.0))


@pytest.fixture(scope="module")
def graphs(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("graphs") / "FOLDER"
    results = export(checkpoint, "onnx", path)
    assert {result.tolerance for result in results} == {2e-5}
    assert all(str(result) in (path / "README.md").read_text() for result in results)
    return path


def test_graphs_take_any_batch(checkpoint, graphs) -> None:
    vision, text = (open_session(graphs / name) for name in ("vision.onnx", "text.onnx"))
    for batch in (1, 2, 3, 5, 7):
        images, ids = torch.randn(batch, 3, 40, 40), torch.randint(0, checkpoint.tokenizer.cls_id, (batch, 12))
        ids[:, -1] = checkpoint.tokenizer.cls_id
        with torch.inference_mode():
            ours = unit(checkpoint.vision(images)), checkpoint.model.encode_text(ids)
        (embeds,) = vision.run(["image_embeds"], {"images": images.numpy()})
        assert compare("images", ours[0], torch.from_numpy(embeds), 2e-5).passed
        (embeds,) = text.run(None, {"ids": ids.numpy()})
        assert compare("texts", ours[1], torch.from_numpy(embeds), 2e-5).passed


def test_the_recipe_in_the_card_of_a_graph(checkpoint, graphs, tmp_path, monkeypatch) -> None:
    (tmp_path / "FOLDER").symlink_to(graphs)
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 4), dtype=np.uint8).repeat(12, 0).repeat(12, 1)
    Image.fromarray(pixels).save(tmp_path / "cat.jpg", format="PNG")
    card = (tmp_path / "FOLDER" / "README.md").read_text()
    found: dict = {}
    exec("".join(card.split("```python\n")[1:][index].split("```")[0] for index in (0, 1)), found)
    encoder = openvision.Encoder(checkpoint.model, checkpoint.tokenizer)
    image, texts = encoder.encode_images([tmp_path / "cat.jpg"]), ["a photo of a cat", "a photo of a dog"]
    assert torch.cosine_similarity(torch.from_numpy(found["embedding"]), image).item() > 0.999
    assert np.allclose(found["texts"], encoder.encode_texts(texts), atol=2e-5)
    assert f"({', '.join(map(str, (0.485, 0.456, 0.406)))})" in card


def test_a_graph_describes_itself(checkpoint, graphs) -> None:
    told = json.loads((graphs / "onnx.json").read_text())
    for file in ("vision.onnx", "text.onnx"):
        session = open_session(graphs / file)
        inputs = {each.name: each for each in session.get_inputs()}  # pyright: ignore[reportAttributeAccessIssue]
        outputs = {each.name for each in session.get_outputs()}  # pyright: ignore[reportAttributeAccessIssue]
        assert told[file]["outputs"].keys() == outputs
        assert told[file]["inputs"].keys() == inputs.keys()
        for name, entry in told[file]["inputs"].items():
            assert [type(side) for side in entry["shape"]] == [type(side) for side in inputs[name].shape]
    assert told["preprocessing"]["background"] == [255, 255, 255]
    assert told["preprocessing"]["scale"] * 255 == 1
    assert told["text.onnx"]["inputs"]["ids"]["special"]["[CLS]"] == checkpoint.tokenizer.cls_id


# tests/replay/test_export.py has such graphs.
@pytest.mark.slow
def test_a_graph_of_free_resolution(checkpoint, tmp_path) -> None:
    export(checkpoint, "onnx", tmp_path / "out", ExportOptions(dynamic_resolution=True))
    session = open_session(tmp_path / "out" / "vision.onnx")
    for batch, height, width in ((1, 40, 40), (2, 24, 72), (3, 50, 33)):
        images = torch.randn(batch, 3, height, width)
        (embeds, tokens) = session.run(None, {"images": images.numpy()})
        assert tokens.shape == (batch, (height // 8) * (width // 8), 48)
        with torch.inference_mode():
            ours = openvision.models.openvision.unit(checkpoint.vision(images))
        assert compare("embedding", ours, torch.from_numpy(embeds), 2e-5).passed


def test_a_vision_tower_without_head_or_text(tmp_path) -> None:
    alone = vision_alone(CONFIG.vision, None)
    for target in ("safetensors", "transformers", "beit", "onnx"):
        assert all(result.passed for result in export(alone, target, tmp_path / target))
    assert not (tmp_path / "transformers" / "text").exists()
    with pytest.raises(OpenVisionError, match="no text tower"):
        export(alone, "open_clip", tmp_path / "open_clip")
    assert not (tmp_path / "open_clip").exists()


def test_a_tower_whose_positions_keep_their_place(tmp_path) -> None:
    scaled = vision_alone(replace(CONFIG.vision, position_side=3), 24)
    for target in ("safetensors", "transformers", "beit"):
        assert all(result.passed for result in export(scaled, target, tmp_path / target))
        larger = export(scaled, target, tmp_path / f"{target}56", ExportOptions(resolution=56))
        assert all(result.passed for result in larger)


@pytest.mark.slow
def test_a_graph_of_positions_that_keep_their_place(tmp_path) -> None:
    scaled = vision_alone(replace(CONFIG.vision, position_side=3), 24)
    export(scaled, "onnx", tmp_path / "onnx", ExportOptions(dynamic_resolution=True))
    session = open_session(tmp_path / "onnx" / "vision.onnx")
    for size in ((40, 40), (24, 72)):
        images = torch.randn(1, 3, *size)
        (embeds, _) = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            ours = openvision.models.openvision.unit(scaled.vision(images))
        assert compare("embedding", ours, torch.from_numpy(embeds), 2e-5).passed


def masked_checkpoint(pool) -> Checkpoint:
    torch.manual_seed(0)
    vision, text = replace(CONFIG.vision, depth=1), replace(CONFIG.text, pad_id=0, pool=pool)
    model = stirred(OpenVision(replace(CONFIG, vision=vision, text=text)))
    return Checkpoint(model.vision, model, Tokenizer.train(["a red circle on white", "two dogs"], 100), "test", {})


@pytest.mark.parametrize("pool", [pytest.param("class", marks=pytest.mark.slow), "mean"])
def test_a_text_tower_that_masks_padding(tmp_path, pool) -> None:
    masked = masked_checkpoint(pool)
    assert all(result.passed for result in export(masked, "onnx", tmp_path / "onnx"))
    assert export(masked, "safetensors", tmp_path / "own")
    loaded = openvision.load(tmp_path / "own")
    texts = ["a red circle", "two dogs on white", ""]
    assert loaded.model.config.text.pool == pool
    assert torch.isfinite(loaded.encode_texts(texts)).all()
    for target in ("open_clip", "transformers"):
        with pytest.raises(OpenVisionError, match="masks padding"):
            export(masked, target, tmp_path / target)


def test_another_resolution(checkpoint, tmp_path) -> None:
    results = export(checkpoint, "transformers", tmp_path / "out", ExportOptions(resolution=56))
    assert all(result.passed for result in results)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_size"] == 56
    with pytest.raises(OpenVisionError, match="smaller than a patch"):
        at_resolution(checkpoint, 7)


def test_a_wrong_export_is_not_kept(checkpoint, tmp_path, monkeypatch) -> None:
    write = targets.transformers.write_beit
    other = stirred(VisionTransformer(CONFIG.vision, CONFIG.embed_dim))
    monkeypatch.setattr(
        targets.transformers, "write_beit", lambda given, folder: write(replace(given, vision=other), folder)
    )
    with pytest.raises(OpenVisionError, match="differs from the model"):
        export(checkpoint, "beit", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nan_is_no_parity() -> None:
    with pytest.raises(OpenVisionError):
        require_parity([Parity("x", float("nan"), 1.0)])


def test_an_occupied_folder_and_an_unknown_target(checkpoint, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OpenVisionError, match="not empty"):
        export(checkpoint, "safetensors", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(OpenVisionError, match="unknown export target 'tensorflow'"):
        export(checkpoint, "tensorflow", tmp_path / "out")


@pytest.mark.parametrize(("width", "hidden"), [(1152, 4304), (1408, 6144), (192, 768), (1280, 5120), (7, 10)])
def test_ratios_give_the_width_back(width, hidden) -> None:
    assert int(width * mlp_ratio(width, hidden)) == hidden


# The commands.


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    export(checkpoint, "safetensors", path)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_export_prints_parity(folder, tmp_path) -> None:
    result = run("export", folder, "--to", "beit", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "pooled: largest difference" in result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_info_and_models(folder) -> None:
    told = run("info", folder).output
    assert "2 blocks of width 48" in told
    assert "5 x 5 patch tokens" in told
    listed = run("models").output
    assert all(name in listed for name in openvision.available_models())


def test_convert(folder, tmp_path) -> None:
    assert run("convert", folder, "-o", tmp_path / "tower", "--vision-only").exit_code == 0
    assert openvision.load_vision(tmp_path / "tower").grid == (5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "{model}", "--to", "caffe", "-o", "{out}"), "unknown export target 'caffe'"),
        (("export", "{model}", "--to", "onnx", "--precision", "int4", "-o", "{out}"), "unknown precision 'int4'"),
        (("export", "{model}", "--to", "siglip", "-o", "{out}"), "--accept-drift"),
        (("info", "openvision-vit-hugh-patch14-224"), "did you mean"),
    ],
)
def test_bad_input(folder, tmp_path, arguments, message) -> None:
    filled = [argument.format(model=folder, out=tmp_path / "out") for argument in arguments]
    result = run(*filled)
    assert isinstance(result.exception, OpenVisionError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_all_targets_are_known_to_the_help() -> None:
    assert TARGETS.keys() == {"safetensors", "open_clip", "timm", "transformers", "beit", "siglip", "onnx"}

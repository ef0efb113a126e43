"""Encoders, captions and evaluation on the GPU give what the CPU gives."""

import io
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.data.shards.dataset import ShardDataset
from openvision.encoding import generate_captions
from openvision.errors import require
from openvision.evaluation.evaluators.base import parse_evaluators
from openvision.evaluation.evaluators.in_training import measure_in_training
from openvision.models.openvision import OpenVision
from openvision.runtime import Processes
from openvision.training.trainer import Trainer
from openvision.weights.export.onnx import VISION_FILE
from openvision.weights.export.parity import example_images
from openvision.weights.export.targets import export
from openvision.weights.load import load_checkpoint
from tests.gpu.runs import recipe_of

TEXTS = ["a red bar", "a blue square on white", "something else"]


@pytest.fixture(scope="module")
def trained(device, shapes_folder, tmp_path_factory) -> Callable[[str], str]:
    """The model folder of a short run on the device; each is trained once."""
    known: dict[str, str] = {}

    def model(kind: str) -> str:
        if kind not in known:
            run = tmp_path_factory.mktemp(kind) / "run"
            Trainer(recipe_of(kind), shapes_folder, run, Processes(device=device)).run()
            known[kind] = str(run / "model")
        return known[kind]

    return model


@pytest.fixture(scope="module")
def images(shapes_folder) -> list[Image.Image]:
    return [Image.open(io.BytesIO(sample.image)) for sample in ShardDataset(shapes_folder / "validation")]


@pytest.mark.parametrize("kind", ["openvision", "clip"])
def test_encode(kind, trained, images, device):
    cpu, here = openvision.load(trained(kind)), openvision.load(trained(kind)).to(device)
    for expected, found in (
        (cpu.encode_images(images), here.encode_images(images)),
        (cpu.encode_texts(TEXTS), here.encode_texts(TEXTS)),
    ):
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert here.classify(images[0], TEXTS)[0][0] == cpu.classify(images[0], TEXTS)[0][0]
    # In bfloat16 the parameters are rounded too.
    half = here.to(dtype=torch.bfloat16)
    assert cosine_similarity(half.encode_images(images), cpu.encode_images(images)).min() > 0.99
    assert cosine_similarity(half.encode_texts(TEXTS), cpu.encode_texts(TEXTS)).min() > 0.99


def test_features_of_openvision_2(trained, images, device):
    folder = trained("openvision2")
    cpu, here = openvision.load_vision(folder), openvision.load_vision(folder).to(device)
    with torch.inference_mode():
        expected, found = cpu.forward_features(images).patch_tokens, here.forward_features(images).patch_tokens.cpu()
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        half = here.to(dtype=torch.bfloat16).forward_features(images).patch_tokens.cpu().float()
    assert cosine_similarity(half.flatten(1), expected.flatten(1)).min() > 0.99


def test_generation_has_the_ids_of_the_cpu(trained, images, device):
    folder = trained("openvision2")
    cpu, here = openvision.load_captioner(folder), openvision.load_captioner(folder).to(device)
    pixels = cpu.preprocess_all(images)
    ids = [
        captioner.model.generate(pixels.to(at), captioner.tokenizer.bos_id, captioner.tokenizer.eos_id).cpu()
        for captioner, at in ((cpu, "cpu"), (here, device))
    ]
    assert torch.equal(*ids)
    captions = here.caption(images, batch_size=5)
    assert captions == cpu.caption(images)
    assert any(captions)


def test_captions_of_version_1_are_those_of_the_cpu(trained, images, device):
    folder = trained("openvision")
    cpu, here = openvision.load(folder), openvision.load(folder).to(device)
    alts = ["a red bar"] * len(images)
    captions = []
    for each in (cpu, here):
        assert isinstance(each.model, OpenVision)
        captions.append(generate_captions(each.model, cpu.tokenizer, cpu.preprocess_all(images), alts))
    assert captions[0] == captions[1]


@pytest.mark.parametrize(
    ("precision", "images", "loss"), [(None, 1, 1e-4), (torch.bfloat16, 3, 2e-2)], ids=["float32", "bfloat16"]
)
def test_zero_shot_and_retrieval(precision, images, loss, trained, device, shapes_folder):
    """Shares within an image or three of the sixteen, a median rank within one, the caption loss by its tolerance."""
    tables = [
        {"kind": "zero_shot", "data": "validation"},
        {"kind": "zero_shot", "name": "groups", "data": "validation", "label": "category", "prompts": "short"},
        {"kind": "retrieval", "data": "validation"},
        {"kind": "caption_loss", "data": "validation"},
    ]
    evaluators = parse_evaluators(tables, "here")
    numbers = []
    for where, autocast in ((torch.device("cpu"), None), (device, precision)):
        checkpoint = load_checkpoint(trained("openvision"))
        assert checkpoint.model is not None
        model = checkpoint.model.to(where)
        numbers.append(measure_in_training(evaluators, model, checkpoint.tokenizer, shapes_folder, 96, autocast))
    expected, found = numbers
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("caption_loss/"):
            assert found[name] == pytest.approx(value, rel=loss), name
        else:
            allowed = 1 if name.endswith("_median") else images / 16
            assert abs(found[name] - value) <= allowed + 1e-6, name


def test_commands_take_the_gpu_and_agree_with_the_cpu(trained, images, shapes_folder, device, tmp_path):
    """Without `--device` on a GPU, which is what auto takes."""
    here = [] if device.type == "cuda" else ["--device", str(device)]
    run = CliRunner().invoke
    vectors = []
    for place, flag in (("cpu", ["--device", "cpu"]), ("here", here)):
        out = tmp_path / f"{place}.safetensors"
        source = str(shapes_folder / "validation")
        done = run(app, ["encode", source, "-o", str(out), "--checkpoint", trained("clip"), *flag])
        assert done.exit_code == 0, done.output
        vectors.append(load_file(out))
    assert vectors[0].keys() == vectors[1].keys()
    for name, tensor in vectors[0].items():
        if tensor.is_floating_point():
            assert torch.allclose(vectors[1][name].float(), tensor.float(), atol=1e-3), name
    picture = tmp_path / "image.png"
    images[0].save(picture)
    told = [
        run(app, ["caption", str(picture), "--checkpoint", trained("openvision2"), *flag])
        for flag in (["--device", "cpu"], here)
    ]
    assert told[0].exit_code == 0, told[0].output
    assert told[0].output == told[1].output


def test_onnx_runtime_on_the_gpu(trained, device, tmp_path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    runtime = require("onnxruntime", extra="onnx")
    provider, options = "CPUExecutionProvider", {}
    if device.type == "cuda":
        # Without TF32, as the CPU computes.
        provider, options = "CUDAExecutionProvider", {"use_tf32": "0"}
    if provider not in runtime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {provider}")
    checkpoint = load_checkpoint(trained("openvision"))
    export(checkpoint, "onnx", tmp_path / "out")
    session = runtime.InferenceSession(str(tmp_path / "out" / VISION_FILE), providers=[(provider, options)])
    if session.get_providers()[0] != provider:
        pytest.skip(f"this ONNX Runtime cannot load the libraries of its {provider}")
    batch = example_images(checkpoint.vision, batch=5)
    (embeds, _) = session.run(None, {"images": batch.numpy()})
    with torch.inference_mode():
        expected = checkpoint.vision.encode_image(batch)
    assert torch.allclose(torch.from_numpy(embeds), expected, rtol=0, atol=1e-4)

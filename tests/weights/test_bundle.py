"""An ONNX bundle: its script without torch gives the encoder's answers; latency of exported folders."""

import json
import subprocess
import sys
import sysconfig
from logging.handlers import BufferingHandler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.inference import latency
from openvision.inference.latency import measure_latency
from openvision.weights.export import bundle as module
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.load import load_checkpoint

LABELS = ("a red square", "a blue bar", "a green corner")
# Only what the bundle says that it needs, and what onnxruntime itself imports.
ALLOWED = ("numpy", "PIL", "onnxruntime", "pillow", "flatbuffers", "google", "packaging", "sympy", "mpmath")


@pytest.fixture(scope="module")
def bundle(tiny_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "edge"
    arguments = ["export", str(tiny_run), "--to", "onnx", "-o", str(folder), "--bundle", "--labels", ", ".join(LABELS)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def edge(tmp_path_factory) -> Path:
    """A folder of packages without torch, as the path of an interpreter that sees nothing else."""
    folder, site = tmp_path_factory.mktemp("edge"), Path(sysconfig.get_path("purelib"))
    for path in site.iterdir():
        if path.name.split(".")[0].split("-")[0] in ALLOWED:
            (folder / path.name).symlink_to(path)
    return folder


def run(edge: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import runpy; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__'); assert 'torch' not in sys.modules"
    command = [sys.executable, "-I", "-S", "-c", code, str(edge), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_script_gives_the_encoders_answers_without_torch(bundle, edge, tiny_run, tmp_path):
    assert run(edge, "/dev/null").returncode == 0
    missing = subprocess.run([sys.executable, "-I", "-S", "-c", "import torch"], capture_output=True)
    assert missing.returncode != 0
    image = tmp_path / "one.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(image)
    done = run(edge, bundle / "run.py", image)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    expected = openvision.load(tiny_run).classify(image, LABELS)
    assert [label for _, _, label in rows] == [label for label, _ in expected]
    assert [float(share) for _, share, _ in rows] == pytest.approx([share for _, share in expected], abs=2e-3)


def test_without_labels_it_prints_the_embedding(bundle, edge, tiny_run, tmp_path):
    import shutil

    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / module.LABELS).unlink()
    image = tmp_path / "one\x1b[2J.png"
    Image.new("RGB", (32, 32), "red").save(image)
    done = run(edge, folder / "run.py", image)
    assert "one\\x1b[2J.png" in done.stdout
    vector = [float(value) for value in done.stdout.split("\t")[1:]]
    assert np.allclose(vector, openvision.load(tiny_run).encode_images([image])[0].numpy(), atol=1e-4)
    assert "give image files" in run(edge, folder / "run.py").stderr


def test_the_script_is_short(bundle):
    lines = [line for line in (bundle / "run.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 40
    assert json.loads((bundle / module.LABELS).read_text())["labels"] == list(LABELS)


def test_latency_of_a_bundle_and_of_weights_in_turns(bundle, tiny_run, monkeypatch):
    # A clock on which each batch takes as many seconds as there were readings before it: the measure takes fewer.
    readings = iter(range(1000))
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: next(readings) ** 2))
    both = measure_latency([bundle, tiny_run], batch=2, runs=3)
    assert [found.runtime for found in both] == ["ONNX Runtime, cpu", "torch, cpu"]
    assert [found.pixels for found in both] == [32, 32]
    # Rounds of (1, 5), (9, 13), (17, 21) seconds.
    assert [found.p50 for found in both] == [9, 13]
    assert [found.images_per_second for found in both] == [2 / 9, 2 / 13]
    assert [found.speed for found in both] == [1, 9 / 13]
    monkeypatch.undo()
    done = CliRunner().invoke(app, ["bench", str(bundle), str(tiny_run), "--batch", "1", "--runs", "2"])
    assert done.exit_code == 0, done.output
    assert "ONNX Runtime, cpu, 32 px" in done.output
    assert f"speed: times that of {bundle}" in " ".join(done.output.split())


def test_beside_onnx_graphs_auto_is_the_cpu(bundle, tiny_run, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = measure_latency([tiny_run, bundle], runs=1, device="auto")
    assert [one.runtime for one in found] == ["torch, cpu", "ONNX Runtime, cpu"]
    with pytest.raises(OpenVisionError, match="has ONNX graphs, which are measured on the CPU"):
        measure_latency([tiny_run, bundle], runs=1, device="mps")


def test_a_transformers_export_is_timed_without_a_notice(tiny_run, tmp_path):
    folder = tmp_path / "vit"
    export(load_checkpoint(tiny_run), "transformers", folder, ExportOptions(check=False))
    handler = BufferingHandler(capacity=1000)
    transformers_logging.add_handler(handler)
    try:
        (found,) = measure_latency([folder], runs=1)
    finally:
        transformers_logging.remove_handler(handler)
    assert (found.runtime, found.pixels) == ("transformers, cpu", 32)
    assert handler.buffer == []


def test_bad_input_is_one_sentence(bundle, tiny_run, tmp_path):
    def refused(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert isinstance(done.exception, OpenVisionError)
        return str(done.exception)

    out = tmp_path / "out"
    assert "--bundle goes with ONNX" in refused("export", tiny_run, "--to", "safetensors", "-o", out, "--bundle")
    assert "add --bundle" in refused("export", tiny_run, "--to", "onnx", "-o", out, "--labels", "a")
    vision = ("export", tiny_run, "--to", "onnx", "--vision-only", "-o", out, "--bundle", "--labels", "a", "--no-check")
    assert "labels have no vectors" in refused(*vision)
    assert not out.exists()
    assert "is not a model folder" in refused("bench", tmp_path)
    assert "nothing does not exist; give folders" in refused("bench", tmp_path / "nothing")
    assert "leave --device out" in refused("bench", bundle, "--device", "cuda")
    (tmp_path / "onnx.json").write_text("{}")
    assert "is broken: image_size" in refused("bench", tmp_path)
    (tmp_path / "onnx.json").unlink()
    (tmp_path / "config.json").write_text('{"architecture": "vit", "pretrained_cfg": {}, "model_args": []}')
    assert "config.json is broken: image_size" in refused("bench", tmp_path)

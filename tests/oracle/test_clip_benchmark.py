"""Our checkpoints inside clip_benchmark's own command, and its data sets inside ours: the same accuracy."""

# pyright: reportMissingImports=false

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import measure_all, parse_evaluators
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.suites.clip_benchmark import load_openvision
from openvision.models.openvision import OpenVision
from openvision.models.vision import VisionTransformer
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from tests.oracle.test_evaluation import CONFIG

NAMES = ["red", "green", "blue", "white", "black", "grey"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    model = OpenVision(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("run") / "model"
    save_folder(folder, model, Tokenizer.train([f"a picture of {name}" for name in NAMES], 300), "", {})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty pictures in clip_benchmark's webdataset layout."""
    folder = tmp_path_factory.mktemp("wds")
    (folder / "test").mkdir()
    (folder / "test/nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\na picture of {c}\n")
    generator = np.random.default_rng(0)
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for number in range(40):
            blocks = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8).repeat(10, axis=0).repeat(10, axis=1)
            buffer = io.BytesIO()
            Image.fromarray(blocks).save(buffer, "PNG")
            for name, content in (
                (f"{number:04d}.png", buffer.getvalue()),
                (f"{number:04d}.cls", b"%d" % (number % 6)),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.slow
def test_its_command_gives_our_accuracy(checkpoint, data, tmp_path) -> None:
    shim = tmp_path / "shim"
    shim.mkdir()
    # A process of its own needs the operators that conftest.py declares for this one.
    shutil.copy(Path(__file__).with_name("conftest.py"), shim / "sitecustomize.py")
    # Scoring of captions, which wants Java, is imported by the command whatever is measured.
    for name in ("tokenizer/ptbtokenizer", "bleu/bleu", "meteor/meteor", "rouge/rouge", "cider/cider", "spice/spice"):
        file = shim / "pycocoevalcap" / f"{name}.py"
        file.parent.mkdir(parents=True)
        file.write_text("PTBTokenizer = Bleu = Meteor = Rouge = Cider = Spice = None\n")
    (shim / "pycocoevalcap/eval.py").write_text("COCOEvalCap = object\n")
    path = os.pathsep.join([str(shim), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ["eval", "--model_type", "openvision", "--model", "openvision", "--pretrained", str(checkpoint)]
    words += ["--dataset", "wds/set", "--dataset_root", str(data), "--task", "zeroshot_classification"]
    words += ["--output", str(tmp_path / "result.json"), "--num_workers", "0", "--no_amp"]
    done = subprocess.run(
        [sys.executable, "-m", "openvision.evaluation.suites.clip_benchmark", *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = json.loads((tmp_path / "result.json").read_text())["metrics"]

    model, _, _ = load_openvision(pretrained=str(checkpoint))
    tower = model.model.vision
    assert isinstance(tower, VisionTransformer)
    tokenizer = Tokenizer.load(checkpoint)
    table = {"kind": "zero_shot", "data": "test", "label": "cls", "prompts": "zeroshot_classification_templates.txt"}
    evaluated = EvaluatedModel(tower, model.model, tokenizer)
    ((_, ours),) = measure_all(parse_evaluators([table], "test"), evaluated, data)
    assert ours.values["top1"] == theirs["acc1"]
    assert ours.values["top5"] == theirs["acc5"]
    assert ours.values["mean_per_class"] == pytest.approx(theirs["mean_per_class_recall"])
    assert 0 < theirs["acc1"] < theirs["acc5"]


def test_a_tower_alone_is_refused(tmp_path) -> None:
    save_folder(tmp_path / "tower", VisionTransformer(CONFIG.vision, 8), None, "", {})
    with pytest.raises(OpenVisionError, match="no text tower"):
        load_openvision(pretrained=str(tmp_path / "tower"))

"""Command blocks of the docs that need stock timm and open_clip, executed as printed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from tests.test_docs_commands import ROOT, with_marker

BLOCKS = with_marker("run: oracle")


def test_there_are_such_blocks() -> None:
    assert BLOCKS


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=[pytest.mark.slow] if "openvision train" in block.text else []) for block in BLOCKS],
    ids=str,
)
def test_run(block, tmp_path) -> None:
    config = OpenVisionConfig(
        embed_dim=24,
        vision=VisionConfig(width=48, depth=2, mlp_dim=96, heads=3, patch_size=8, image_size=32),
        # Masked padding, as the quickstart has it: no stock class takes such a text tower.
        text=TextConfig(
            width=32, depth=2, mlp_dim=64, heads=2, vocab_size=120, context_length=12, pad_id=0, pool="mean"
        ),
    )
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    save_folder(tmp_path / "runs/quickstart/model", OpenVision(config), Tokenizer.train(["a dog"], 100), "", {})
    # The commands are processes of their own, which need the operators that conftest.py declares for this one.
    shim = tmp_path / "shim"
    shim.mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), shim / "sitecustomize.py")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(shim)}
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest difference" in done.stdout

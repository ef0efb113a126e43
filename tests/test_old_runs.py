"""Runs, checkpoints, models and results that were written in November 2026 still load (tests/golden/run-2026-11).

Everything goes through the command line and the package's public names: modules may move.
"""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app

# What a CPU may round otherwise than another (2e-6 without AVX); six steps change most weights by over 2e-4.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def old(golden_folder, tmp_path_factory) -> Path:
    """A copy that may be written to, with the held-out sets that a report reads: those of the fixture were the same
    sixteen pictures."""
    folder = tmp_path_factory.mktemp("old") / "run-2026-11"
    shutil.copytree(golden_folder / "run-2026-11", folder)
    for name in ("heldout_compositional", "heldout_random"):
        shutil.copytree(folder / "data/validation", folder / "data" / name)
    return folder


@pytest.fixture(scope="module")
def expected(old) -> dict:
    return json.loads((old / "expected.json").read_text())


@pytest.fixture(scope="module")
def pictures(old, expected) -> list[Image.Image]:
    with tarfile.open(old / "data/validation/000000.tar") as tar:
        files = [tar.extractfile(name) for name in expected["images"]]
        return [Image.open(io.BytesIO(file.read())) for file in files if file is not None]


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, f"{done.output}{done.exception}"
    return done.output


def weights(model: Path) -> dict[str, np.ndarray]:
    return load_file(model / "model.safetensors")


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("kind", ["openvision", "openvision2"])
def test_a_stopped_run_goes_on(kind, old, tmp_path):
    stopped, finished = tmp_path / "stopped", old / kind / "finished"
    shutil.copytree(old / kind / "stopped", stopped)
    done = run("train", stopped / "recipe.toml", "--data", old / "data", "--run", stopped)
    assert "step 7/12" in done
    assert "step 6/12" not in done
    assert losses(stopped) == pytest.approx(losses(finished), rel=1e-4)
    assert len(losses(stopped)) == 12
    sessions = json.loads((stopped / "sessions.json").read_text())
    assert [each["from_step"] for each in sessions] == [0, 6]
    assert sessions[1]["accepted"] == []
    found, whole = weights(stopped / "model"), weights(finished / "model")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("kind", ["openvision", "openvision2"])
def test_the_recipe_of_a_run_is_read(kind, old):
    found = run("recipe", "diff", old / kind / "finished/recipe.toml", old / kind / "stopped/recipe.toml")
    assert "no differences" in found


def test_checkpoints_are_listed_and_verified(old):
    listed = run("checkpoint", "ls", old / "openvision/stopped").splitlines()
    assert [line.split()[0] for line in listed[1:3]] == ["4", "6"]
    assert listed[3].startswith("best: step 4")
    assert run("checkpoint", "verify", old / "openvision/stopped").count("intact") == 2
    assert run("checkpoint", "verify", old / "openvision2/stopped").count("intact") == 1


@pytest.mark.parametrize("export", ["openvision", "openvision--average", "openvision2"])
def test_checkpoints_are_exported(export, old, expected, tmp_path):
    kind, *options = export.partition("--average")[:2]
    run("checkpoint", "export", old / kind / "stopped", "-o", tmp_path / "model", *filter(None, options))
    tensors = weights(tmp_path / "model")
    digest = hashlib.sha256(b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors)))
    assert digest.hexdigest() == expected["exports"][export]


def test_models_give_the_features_they_gave(old, expected, pictures):
    features = load_file(old / "expected.safetensors")
    encoder = openvision.load(old / "openvision/finished/model")
    tower = openvision.load_vision(old / "openvision2/finished/model")
    found = {
        "openvision/images": encoder.encode_images(pictures),
        "openvision/texts": encoder.encode_texts(expected["texts"]),
        "openvision2/images": tower.forward_features(pictures).pooled.detach(),
    }
    assert found.keys() == features.keys()
    for name, values in features.items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=0, atol=TOLERANCE, err_msg=name)


def test_a_captioner_still_captions(old, pictures):
    captions = openvision.load_captioner(old / "openvision2/finished/model").caption(pictures[:2])
    assert [type(caption) for caption in captions] == [str, str]


def test_results_of_a_suite_are_compared(old, tmp_path):
    folders = (old / "results/finished", old / "results/finished-2")
    found = run("compare", *folders, "--page", tmp_path / "page.html")
    for metric in ("names: top1", "sentences: t2i_r5", "knn: top1"):
        assert metric in found
    assert "left out" not in found
    assert "finished is better: on 1 of 9 metrics" in found
    assert (tmp_path / "page.html").is_file()


def test_a_finished_run_is_reported_from_its_own_evaluation(old):
    folder = old / "openvision/finished"
    before = (folder / "evaluation.json").read_bytes()
    run("report", folder, "--data", old / "data")
    assert (folder / "report/index.html").is_file()
    assert (folder / "evaluation.json").read_bytes() == before

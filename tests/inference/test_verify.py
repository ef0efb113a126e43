"""`openvision verify`: what it compares, and that it can say no."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.inference import verify as module
from openvision.inference.verify import DRAWINGS, Verification, verify
from openvision.models.openvision import OpenVision
from openvision.weights.folder import load_folder, save_folder

ALL_RIGHT = tuple((label, label, 0.9) for label in DRAWINGS.values())


def test_every_picture_is_answered(model_folder) -> None:
    report = verify(str(model_folder))
    assert report.expected_parameters is None
    assert report.answers is not None
    assert [true for true, _, _ in report.answers] == list(DRAWINGS.values())
    assert all(best in DRAWINGS.values() and 0 < share <= 1 for _, best, share in report.answers)
    assert f"{report.parameters:,} parameters" in report.lines()[0]


def test_it_runs_where_it_is_told(model_folder, monkeypatch) -> None:
    chosen = []
    monkeypatch.setattr(module.Encoder, "to", lambda encoder, device: chosen.append(device) or encoder)
    monkeypatch.setattr(module, "_LEAST_CORRECT", 0)
    assert CliRunner().invoke(app, ["verify", str(model_folder), "--device", "cpu"]).exit_code == 0
    verify(str(model_folder), device=torch.device("meta"))
    assert [device.type for device in chosen] == ["cpu", "meta"]


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"expected_parameters": 11}, False),
        ({"answers": (*ALL_RIGHT[:5], *((true, "wrong", 0.5) for true, _, _ in ALL_RIGHT[5:]))}, True),
        ({"answers": (*ALL_RIGHT[:4], *((true, "wrong", 0.5) for true, _, _ in ALL_RIGHT[4:]))}, False),
        ({"answers": None}, True),
    ],
)
def test_when_it_passes(changes, passed) -> None:
    assert replace(Verification("x", 10, 10, ALL_RIGHT), **changes).passed == passed


def test_a_vision_tower_has_nothing_to_classify(model_folder, tmp_path) -> None:
    model, _, _ = load_folder(model_folder)
    save_folder(tmp_path / "tower", model.vision, None, "", {})
    report = verify(str(tmp_path / "tower"))
    assert report.answers is None
    assert "no text tower" in report.lines()[-1]


def test_an_untrained_model_is_told_from_a_trained_one(model_folder, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    model, tokenizer, _ = load_folder(model_folder)
    save_folder(tmp_path / "model", OpenVision(model.config), tokenizer, "", {})
    # Random weights see every picture alike, so hardly more than one of eight different names can be right.
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "model")])
    assert isinstance(result.exception, OpenVisionError)
    assert "of 8 drawings recognised" in result.output
    monkeypatch.setattr(module, "_LEAST_CORRECT", 0)
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "model")]).exit_code == 0

"""Reconstruction against itself, the ceiling and the constant, on a small OpenVision 3 model."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import parse_evaluators
from openvision.evaluation.evaluators.in_training import less_is_better
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.evaluators.reconstruction import INCEPTION, Reconstruction
from openvision.evaluation.metrics.reconstruction import frechet_distance, psnr, ssim
from openvision.models.openvision2 import build_model
from tests.training.small_step import recipe_of


@pytest.fixture(scope="module")
def evaluated() -> EvaluatedModel:
    model = build_model(recipe_of("openvision3").model)
    return EvaluatedModel(model.vision, model, None, 32)


def test_the_evaluator_of_a_recipe(evaluated, shapes_folder):
    (one,) = parse_evaluators([{"kind": "reconstruction", "data": "validation", "limit": 6}], "test")
    measured = one.measure(evaluated, shapes_folder)
    values = measured.values
    assert measured.facts == {"images": 6, "resolution": 32, "rejected": 0}
    # Pixels are kept exactly by this autoencoder, and an untrained model is worse than one colour.
    assert values["autoencoder_psnr"] == 100
    assert values["autoencoder_l1"] < 1e-6
    assert 0 < values["constant_l1"] < values["l1"] * 2
    assert values["psnr"] < values["autoencoder_psnr"]
    assert {
        "constant_latents_l1",
        "latents_l1",
        "distance_efficientnet_lite0",
        "fd_efficientnet_lite0",
    } <= values.keys()
    assert not {"lpips", "rfid"} & values.keys()
    assert less_is_better("reconstruction/fd_efficientnet_lite0")
    assert not less_is_better("reconstruction/psnr")


def test_a_perfect_reconstruction_has_no_distance(evaluated, shapes_folder, monkeypatch):
    monkeypatch.setattr(
        type(evaluated.model.reconstruction), "forward", lambda self, tokens, grid: torch.zeros(len(tokens), 48, 8, 8)
    )
    values = Reconstruction(data="validation", stand_in=False).measure(evaluated, shapes_folder).values
    # A grey image: half of the range away from black and white, on drawings that are mostly white.
    assert 0.3 < values["l1"] < 0.5
    assert "fd_efficientnet_lite0" not in values


def test_fid_takes_its_weights_from_a_folder(evaluated, shapes_folder, tmp_path, monkeypatch):
    with pytest.raises(OpenVisionError, match=f"has no {INCEPTION}"):
        Reconstruction(data="validation", inception=str(tmp_path)).measure(evaluated, shapes_folder)
    (tmp_path / INCEPTION).touch()

    class Extractor(torch.nn.Module):
        def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert (features, feature_extractor_weights_path) == (["2048"], str(tmp_path / INCEPTION))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            assert images.dtype == torch.uint8
            return (images.float().mean(dim=(2, 3)),)

    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    one = Reconstruction(data="validation", stand_in=False, inception=str(tmp_path))
    assert one.measure(evaluated, shapes_folder).values["rfid"] > 0


def test_other_models_and_tiny_images_are_refused(evaluated, shapes_folder):
    other = build_model(recipe_of("clip").model)
    with pytest.raises(OpenVisionError, match="cannot reconstruct"):
        Reconstruction(data="validation").measure(EvaluatedModel(other.vision, other, None, 32), shapes_folder)
    with pytest.raises(OpenVisionError, match="from 32 px on, not at 16"):
        small = EvaluatedModel(evaluated.vision, evaluated.model, None, 16)
        Reconstruction(data="validation").measure(small, shapes_folder)


def test_psnr_by_hand():
    black, grey = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    # A fifth of the range everywhere: 1 / 0.04 = 25.
    assert psnr(black, grey).tolist() == pytest.approx([10 * np.log10(25)] * 2)
    assert psnr(grey, grey).tolist() == [100.0, 100.0]


def test_ssim_of_equal_shifted_and_inverted_images():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])
    assert (ssim(images, 255 - images) < 0).all()
    noisy = (images.float() + 20 * torch.randn(images.shape)).clamp(0, 255).to(torch.uint8)
    assert ((ssim(images, noisy) > 0.7) & (ssim(images, noisy) < 1)).all()
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(images[..., :8], images[..., :8])


def test_frechet_distance_of_gaussians_is_known():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(20_000, 4))
    # Means apart by (1, 0, 0, 0), deviations 1 and 2: 1 + 4 * (1 - 2)^2.
    second = 2 * rng.normal(size=(20_000, 4)) + np.array([1, 0, 0, 0])
    assert frechet_distance(first, second) == pytest.approx(5, rel=0.05)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)

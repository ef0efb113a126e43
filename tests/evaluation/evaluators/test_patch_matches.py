"""Patches by texts and in another view: a tower that knows scores in full, positions alone do not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from openvision.data.sources.scenes.make import Options, make_scenes
from openvision.errors import OpenVisionError
from openvision.evaluation.data.masks import GROUND, WORD, open_masks
from openvision.evaluation.evaluators import patch_matches
from openvision.evaluation.evaluators.base import measure_all, parse_evaluators
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.evaluators.patch_matches import expected_places, is_near, nearest_patches, other_view
from openvision.weights.folder import load_folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "made", Options(40, 12, objects=6), workers=1)


@pytest.fixture
def subject(fake_run) -> EvaluatedModel:
    model, tokenizer, _ = load_folder(fake_run / "model")
    return EvaluatedModel(model.vision, model, tokenizer, resolution=96)


def measured(subject, root, table):
    ((_, found),) = measure_all(parse_evaluators([table], "test"), subject, root)
    return found


TEXT = {"kind": "text_patches", "data": "validation"}
VIEWS = {"kind": "correspondence", "data": "validation", "mask": "mask_png", "limit": 6}


def test_patches_that_are_their_names_are_named(subject, scenes, monkeypatch):
    data = open_masks("validation", scenes, "mask_png", "objects")
    names = sorted({name for own in data.objects for name in own})
    # Unrelated texts: the words of these names are in no vocabulary of a model that saw none of them.
    texts = torch.eye(len(names))
    monkeypatch.setattr(patch_matches, "classifier", lambda encode, names, how: texts.numpy())
    truth = data.truth(np.arange(len(data.images)), [GROUND, WORD, *names], subject.grid)
    images = iter(truth)

    def told(tokens: torch.Tensor) -> torch.Tensor:
        # What a perfect tower says; ground and word are told to be the first name, which must not count.
        return torch.stack([texts[torch.from_numpy(np.maximum(next(images) - 2, 0))] for _ in tokens])

    monkeypatch.setattr(subject.vision, "embed_patches", told)
    found = measured(replace(subject, batch_size=5), scenes, TEXT)
    assert found.values["miou"] == found.values["accuracy"] == 1
    assert 0 < found.values["majority_miou"] < 1
    assert found.facts["classes"] == len(names)
    assert found.facts["patches"] == (truth >= 2).sum()


def test_a_tower_that_knows_nothing_scores_between_nothing_and_all(subject, scenes):
    found = measured(subject, scenes, TEXT)
    assert 0 <= found.values["miou"] <= found.values["accuracy"] < 0.9
    with pytest.raises(OpenVisionError, match="lacks 'nothing' or 'objects'"):
        measured(subject, scenes, TEXT | {"mask": "nothing"})


def test_places_in_the_view_are_where_the_pixels_went():
    # Each pixel holds its own place: the view says where its patches come from.
    pixels, patch = 64, 8
    y, x = torch.meshgrid(torch.arange(pixels), torch.arange(pixels), indexing="ij")
    view = other_view(torch.stack([y, x, y])[None].to(torch.uint8))[0].float()
    came = torch.nn.functional.avg_pool2d(view, patch)[:2].permute(1, 2, 0).reshape(-1, 2)
    expected = expected_places((8, 8), patch, pixels)
    np.testing.assert_allclose((came.numpy() + 0.5) / patch - 0.5, expected, atol=0.1)
    assert expected[0].tolist() == [0.875, 6.125]


def test_the_right_patch_is_within_one_patch():
    expected = np.array([[1.0, 1.5]])
    for row, column, right in [(1, 1, True), (2, 2, True), (0, 1, True), (1, 3, False), (3, 1, False)]:
        assert is_near(np.array([row * 4 + column]), expected, (4, 4)).tolist() == [right]
    tokens = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    assert nearest_patches(tokens, 3 * tokens[::-1]).tolist() == list(range(15, -1, -1))


def test_views_are_measured_beside_baselines(subject, scenes):
    found = measured(subject, scenes, VIEWS)
    assert set(found.values) == {f"{row}correspondence" for row in ("", "pixels_", "untrained_", "same_place_")}
    assert all(0 <= value <= 1 for value in found.values.values())
    assert found.values["same_place_correspondence"] < 0.5, "staying where one is does not pass"
    everywhere = measured(subject, scenes, {key: value for key, value in VIEWS.items() if key != "mask"})
    assert int(everywhere.facts["patches"]) > int(found.facts["patches"]) > 0, "the ground does not count with masks"
    with pytest.raises(OpenVisionError, match="measure it without --native"):
        measured(replace(subject, preprocessing="native"), scenes, VIEWS)

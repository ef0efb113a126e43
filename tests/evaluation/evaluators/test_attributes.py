"""Attributes of scenes by probes, with their baselines; masks of scenes by patches; the suite that asks for them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.data.sources.scenes.make import Options, make_scenes
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import Captioned, ImageSet
from openvision.evaluation.data.masks import GROUND, WORD, Masks, open_masks
from openvision.evaluation.evaluators.attributes import AnyOf, AttributeProbe, OneOf, OneOfEach
from openvision.evaluation.evaluators.base import measure_all, parse_evaluators
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.evaluators.patch_probe import present_iou
from openvision.evaluation.suites.suite import load_suite
from openvision.weights.folder import load_folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "made", Options(400, 40, objects=12), workers=1)


@pytest.fixture
def subject(fake_run) -> EvaluatedModel:
    model, tokenizer, _ = load_folder(fake_run / "model")
    return EvaluatedModel(model.vision, model, tokenizer)


def measured(subject, root, *tables):
    return [result for _, result in measure_all(parse_evaluators(list(tables), "test"), subject, root)]


def test_a_word_is_one_of_several():
    asked = OneOf(["b", "a", "b"])
    assert asked.names == ["a", "b"]
    outcomes = asked.outcomes(np.array([[1, 0], [1, 0]], dtype=np.float32), ["a", "b"], np.array([4, 7]))
    assert (outcomes.values.tolist(), outcomes.units.tolist()) == ([1, 0], [4, 7])
    assert asked.chance(["a"]) == 0.5


def test_a_list_is_answered_by_as_many_names_as_are_true():
    asked = AnyOf([["a", "b"], ["c"]])
    scores = np.array([[3, 1, 2], [1, 3, 2]], dtype=np.float32)
    values = [["a", "b"], ["c"]]
    assert asked.outcomes(scores, values, np.arange(2)).values.tolist() == [0.5, 0]
    assert asked.any_first(scores, values, np.arange(2)).values.tolist() == [1, 0]
    assert asked.chance(values) == pytest.approx(1.5 / 3)


def test_an_object_is_answered_for_each_of_its_keys():
    values = [{"cat": "left", "bus": "right"}, {"cat": "right"}]
    asked = OneOfEach(values)
    assert (asked.keys, asked.names) == (["bus", "cat"], ["left", "right"])
    targets = asked.targets(values)
    assert targets.tolist() == [[0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 0, 1]]
    assert asked.outcomes(targets, values, np.array([3, 5])).values.tolist() == [1, 1, 1]
    assert asked.outcomes(targets[::-1], values, np.array([3, 5])).units.tolist() == [3, 3, 5]
    assert asked.outcomes(targets[::-1], values, np.array([3, 5])).mean < 1


def test_probes_learn_what_pixels_show_and_every_number_has_its_baselines(subject, scenes):
    background, objects, places, word = measured(
        subject,
        scenes,
        *(
            {
                "kind": "attribute_probe",
                "name": label,
                "label": label,
                "data": "validation",
                "train": "train",
                **({} if label == "places" else {"prompts": "plain"}),
            }
            for label in ("background", "objects", "places", "word")
        ),
    )
    assert background.values["pooled_top1"] > 0.8
    assert background.values["chance_top1"] == 1 / 8
    assert background.values["majority_top1"] < 0.4
    rows = {"pooled", "patches", "untrained_pooled", "untrained_patches", "chance", "majority", "pixels10"}
    assert set(places.values) == {f"{row}_top1" for row in rows}
    assert set(word.values) == {f"{row}_top1" for row in {*rows, "zero_shot"}}
    assert set(objects.values) == {f"{row}_recall" for row in {*rows, "zero_shot"}} | {"zero_shot_top1"}
    for result in (background, objects, places, word):
        for metric, (low, high) in result.intervals.items():
            assert low <= result.values[metric] <= high
        assert all(result.values[metric] == found.mean for metric, found in result.outcomes.items())
    printed = [index for index in range(40) if "word" in ShardDataset(scenes / "validation")[index].meta]
    assert word.facts["images"] == len(printed) < 40
    assert word.outcomes["pooled_top1"].units.tolist() == printed
    assert background.facts["train"] == 400


def test_the_untrained_tower_is_the_same_every_time_and_not_the_model(subject, scenes):
    table = {"kind": "attribute_probe", "label": "groups", "data": "validation", "train": "train", "train_limit": 60}
    (first,) = measured(subject, scenes, table)
    (second,) = measured(replace(subject, batch_size=7, _kept={}, _encoded={}), scenes, table)
    assert first.values == pytest.approx(second.values)
    weights = [one.vision.patch_embed.proj.weight for one in (subject, subject.untrained())]
    assert not np.allclose(*(weight.detach().numpy() for weight in weights))
    assert subject.untrained() is subject.untrained()
    (alone,) = measured(subject, scenes, {**table, "baselines": False})
    assert set(alone.values) == {"pooled_top1", "patches_top1"}
    with pytest.raises(OpenVisionError, match="'places' holds objects, which prompts cannot ask about"):
        measured(subject, scenes, {**table, "label": "places", "prompts": "plain"})
    assert alone.facts["train"] == 60


def test_cells_bring_the_other_vectors_along(subject, scenes):
    data = AttributeProbe(label="groups", data="validation", train="train")
    images = data._open("validation", scenes, None).images
    plain = subject.encode(images)
    cells = subject.encode(images, cells=True)
    assert plain.cells is None
    assert cells.cells is not None
    assert cells.cells.shape == (40, 16 * 32)
    assert np.array_equal(cells.pooled, plain.pooled)
    assert subject.encode(images) is cells


def write(folder, *fields, image):
    with ShardWriter(folder) as writer:
        for number, own in enumerate(fields):
            writer.write(f"s{number}", image, "png", "text", own)


def test_values_that_cannot_be_asked_are_one_sentence(subject, tmp_path, picture):
    image = picture("red", "bar")
    write(tmp_path / "train", {"x": "a", "y": 3, "z": "a"}, {"x": "b", "y": 4, "z": ["a"]}, image=image)
    write(tmp_path / "data", {"x": "c", "y": 3, "z": "a"}, image=image)
    table = {"kind": "attribute_probe", "data": "data", "train": "train"}
    for label, message in (
        ("x", "no value of 'x' in data is one in train"),
        ("y", "'y' is 3; an attribute is a text, a list"),
        ("z", r"'z' is \['a'\]; an attribute is a text"),
    ):
        with pytest.raises(OpenVisionError, match=message):
            measured(subject, tmp_path, {**table, "label": label})
    (probe,) = parse_evaluators([{**table, "label": "nothing"}], "test")
    assert probe.missing(tmp_path) == f"the field 'nothing' in the samples of {tmp_path / 'train'}"
    (probe,) = parse_evaluators([{**table, "label": "x", "train": "nowhere"}], "test")
    assert probe.missing(tmp_path) == str(tmp_path / "nowhere")


def test_masks_say_what_covers_most_of_each_patch(scenes):
    data = open_masks("validation", scenes, "mask_png", "objects", 3)
    assert len(data.images) == len(data.masks) == 3
    names = [GROUND, WORD, *sorted({name for own in data.objects for name in own})]
    truth = data.truth(np.arange(3), names, (12, 12))
    assert truth.shape == (3, 144)
    for row in range(3):
        shown = {names[number] for number in np.unique(truth[row])}
        assert {GROUND} < shown <= {GROUND, WORD, *data.objects[row]}
    unnamed = replace(data, objects=[[], [], []])
    with pytest.raises(OpenVisionError, match="the value 1, which no object has"):
        unnamed.truth(np.arange(3), names, (12, 12))
    broken = Masks(data.images, ["nonsense"], data.objects)
    with pytest.raises(OpenVisionError, match="is no PNG in base64"):
        broken.truth(np.arange(1), names, (12, 12))


def test_iou_is_averaged_over_what_is_there():
    truth = np.array([[0, 0, 1, 1], [0, 0, 0, 0]])
    answers = np.array([[0, 2, 1, 1], [0, 0, 0, 3]])
    assert present_iou(answers, truth).tolist() == pytest.approx([(1 / 2 + 1) / 2, 3 / 4])


def test_patches_find_masks_beside_baselines(subject, scenes):
    table = {"kind": "patch_probe", "mask": "mask_png", "data": "validation", "train": "train", "limit": 20}
    (found,) = measured(replace(subject, resolution=96), scenes, {**table, "train_limit": 60})
    rows = {"linear", "knn", "pixels_linear", "pixels_knn", "untrained_linear", "untrained_knn", "majority"}
    assert set(found.values) == {f"{row}_miou" for row in rows} | {"linear_accuracy"}
    assert found.values["linear_miou"] > found.values["majority_miou"]
    assert found.facts["images"] == 20
    assert found.facts["classes"] == 14
    with pytest.raises(OpenVisionError, match="lacks 'nothing' or 'objects'"):
        measured(subject, scenes, {**table, "mask": "nothing"})


def test_the_first_images_of_a_retrieval_keep_their_texts():
    images = ImageSet("set", ["a", "b", "c", "d"], lambda index: np.full((1, 1, 3), index, np.uint8), "identity")
    data = Captioned(images, ["a1", "b1", "b2", "c1", "d1", "d2"], np.array([0, 1, 1, 2, 3, 3]))
    few = data.only(2)
    assert few.images.keys == ["a", "d"]
    assert few.texts == ["a1", "d1", "d2"]
    assert few.owner.tolist() == [0, 1, 1]
    assert few.images.load(1).max() == 3
    assert data.only(9) is data


@pytest.mark.slow
def test_the_suite_measures_a_run_and_writes_its_numbers(fake_run, scenes, tmp_path):
    command = [
        "eval",
        str(fake_run),
        "--suite",
        "scenes",
        "--data",
        str(scenes),
        "-o",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / fake_run.name / "evaluation.json").read_text())
    assert content["complete"]
    entries = {entry["name"]: entry["values"] for entry in content["results"]}
    every = load_suite("scenes").evaluators
    drawings = [one.title for one in every if one.data == "heldout_drawings"]
    assert list(entries) == [one.title for one in every if one.title not in drawings]
    assert content["skipped"] == [f"{drawings[0]} and 1 more: {scenes / 'heldout_drawings'} is missing"]
    assert 0 <= entries["heldout_combinations, word"]["patches_top1"] <= 1
    assert entries["single objects"]["top5"] >= entries["single objects"]["top1"]
    assert "validation, masks" in (tmp_path / "table.md").read_text()

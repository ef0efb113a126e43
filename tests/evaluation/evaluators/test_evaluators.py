"""Evaluators: parsed from tables, measured on images, alone and by several processes, in training."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.encoding import evaluating
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ImageSet, labelled_shards, take
from openvision.evaluation.data.prompts import first_alike, protocol
from openvision.evaluation.evaluators import base as registry
from openvision.evaluation.evaluators.base import Evaluator, Measured, due, measure_all, metrics_line, parse_evaluators
from openvision.evaluation.evaluators.in_training import check_evaluators, less_is_better, measure_in_training
from openvision.evaluation.evaluators.model import EvaluatedModel, prepared_batches
from openvision.evaluation.evaluators.zero_shot import ZeroShot, answers, per_class, summarize
from openvision.evaluation.metrics.calibration import calibration, confidences
from openvision.evaluation.metrics.ranks import similarity
from openvision.evaluation.suites.own import validation_evaluators
from openvision.images.decode import BadSampleError
from openvision.training.validation import validate
from openvision.weights.folder import load_folder

ALL = [
    {"kind": "zero_shot", "name": "names", "data": "heldout_compositional"},
    {"kind": "zero_shot", "name": "shapes", "data": "heldout_compositional", "label": "category", "prompts": "short"},
    {"kind": "retrieval", "name": "alt", "data": "heldout_compositional"},
    {
        "kind": "retrieval",
        "name": "sentences",
        "data": "heldout_compositional",
        "text": "synthetic",
        "sentences": True,
    },
    {"kind": "knn", "data": "heldout_compositional", "train": "train", "label": "category", "k": 3},
    {"kind": "linear_probe", "data": "heldout_compositional", "train": "train", "label": "category"},
    {"kind": "few_shot", "data": "heldout_compositional", "train": "train", "label": "category", "shots": [1, 2]},
    {"kind": "patch_probe", "data": "heldout_compositional", "train": "train"},
    {"kind": "caption_loss", "data": "heldout_compositional"},
    {
        "kind": "baselines",
        "data": "heldout_compositional",
        "train": "train",
        "label": "category",
        "text": "txt",
        "match": "exact",
    },
]


@pytest.fixture
def subject(fake_run) -> EvaluatedModel:
    model, tokenizer, _ = load_folder(fake_run / "model")
    return EvaluatedModel(model.vision, model, tokenizer, batch_size=5)


def measured(subject, root, *tables) -> dict:
    found = measure_all(parse_evaluators(list(tables), "test"), subject, root)
    return {evaluator.title: result for evaluator, result in found}


def test_every_kind_measures_with_intervals_round_its_values(subject, fake_data) -> None:
    results = measured(subject, fake_data, *ALL)
    assert list(results) == [str(table.get("name", table["kind"])) for table in ALL]
    for result in results.values():
        assert result.facts["images"] == 12
        for metric, (low, high) in result.intervals.items():
            assert 0 <= low <= high <= 1
            if metric != "ece":
                assert low <= result.values[metric] <= high
        for metric, outcomes in result.outcomes.items():
            assert result.values[metric] == outcomes.mean
    assert set(results["few_shot"].values) == {"top1_1shot", "top1_2shot"}
    # The shapes are told apart by where their pixels are, whatever the random tower does with them.
    assert results["patch_probe"].values["miou"] > results["patch_probe"].facts["miou_majority"]
    assert results["sentences"].facts["texts"] == 24


def test_validation_logs_the_numbers_of_the_evaluators_under_flat_names(subject, fake_data) -> None:
    dataset = ShardDataset(fake_data / "heldout_compositional")
    numbers = validate(subject.model, subject.tokenizer, dataset, 32)
    results = measured(subject, fake_data, *ALL[:4])
    assert numbers["top1"] == results["names"].values["top1"]
    assert numbers["top5"] == results["names"].values["top5"]
    for way in ("t2i_r1", "t2i_r5", "i2t_r1", "i2t_r10"):
        assert numbers[f"alt_{way}"] == results["alt"].values[way]
    recalls = {
        f"{prefix}{way}_r{k}" for prefix in ("", "alt_", "sentence_") for way in ("t2i", "i2t") for k in (1, 5, 10)
    }
    counts = {"images", "candidates", "categories", "rejected"}
    assert numbers.keys() == {"top1", "top5", "category_top1", *recalls, *counts}
    assert [numbers[name] for name in ("images", "candidates", "categories", "rejected")] == [12, 12, 3, 0]
    # One name an image: asking for the image's name is asking for the name's image.
    assert numbers["top1"] == numbers["i2t_r1"]
    assert numbers["t2i_r1"] <= numbers["t2i_r5"] <= numbers["t2i_r10"]


def test_validation_measures_what_the_texts_allow_and_leaves_bad_images_out(subject, tmp_path, picture) -> None:
    with ShardWriter(tmp_path / "v") as writer:
        writer.write("good", picture("red", "square"), "png", "red square", {})
        writer.write("bad", b"no picture", "png", "nothing", {})
        writer.write("fine", picture("blue", "bar"), "png", "blue bar", {})
    dataset = ShardDataset(tmp_path / "v")
    assert [one.title for one in validation_evaluators(dataset, True)] == ["names", "name retrieval", "alt-texts"]
    numbers = validate(subject.model, subject.tokenizer, dataset, 32)
    assert (numbers["images"], numbers["rejected"]) == (2, 1)
    with ShardWriter(tmp_path / "w") as writer:
        writer.write("only", b"no picture", "png", "nothing", {})
    with pytest.raises(OpenVisionError, match="1 of 1 images"):
        validate(subject.model, subject.tokenizer, ShardDataset(tmp_path / "w"), 32)
    with ShardWriter(tmp_path / "x") as writer:
        writer.write("mute", picture("red", "bar"), "png", "", {})
    with pytest.raises(OpenVisionError, match="not every sample has a 'txt'"):
        validation_evaluators(ShardDataset(tmp_path / "x"), True)


def test_other_data_may_bring_candidates_and_groups_list_accuracy(subject, fake_data) -> None:
    table = {"kind": "zero_shot", "data": "heldout_random", "groups": "category"}
    alone = measured(subject, fake_data, table)["zero_shot"]
    more = measured(subject, fake_data, {**table, "candidates": "train"})["zero_shot"]
    assert (alone.facts["classes"], more.facts["classes"]) == (6, 18)
    assert more.values["top1"] <= alone.values["top1"]
    groups = alone.details["top1_by_group"]
    assert set(groups) == {"bar", "pole", "square"}
    assert np.mean(list(groups.values())) == pytest.approx(alone.values["top1"])
    missing = ZeroShot(data="heldout_random", candidates="nowhere").missing(fake_data)
    assert missing == str(fake_data / "nowhere")


def test_prompts_of_a_retrieval_are_those_of_a_classification(subject, fake_data) -> None:
    table = {"data": "heldout_compositional", "prompts": ["{}", "a drawing of {}"]}
    found = measured(subject, fake_data, {"kind": "zero_shot", **table}, {"kind": "retrieval", "text": "name", **table})
    assert found["retrieval"].values["i2t_r1"] == found["zero_shot"].values["top1"]
    assert found["retrieval"].values["i2t_r5"] == found["zero_shot"].values["top5"]


def test_batches_and_threads_change_nothing(subject, fake_data) -> None:
    first = measured(subject, fake_data, *ALL[:5])
    other = EvaluatedModel(subject.vision, subject.model, subject.tokenizer, batch_size=64, threads=1)
    second = measured(other, fake_data, *ALL[:5])
    for name, result in first.items():
        # Accuracies and ranks to the last digit; how sure the model is, to rounding.
        assert result.values == pytest.approx(second[name].values, abs=1e-6)
        assert result.values.get("top1") == second[name].values.get("top1")


def test_answers_against_the_plain_way() -> None:
    generator = np.random.default_rng(0)
    images, classes = (generator.normal(size=(n, 6)).astype(np.float32) for n in (50, 9))
    labels = generator.integers(0, 9, 50)
    ranks, predicted = answers(images, classes, labels)
    scores = similarity(images, classes)
    assert np.array_equal(predicted, scores.argmax(axis=1))
    assert np.array_equal(ranks, [(row > row[own]).sum() for row, own in zip(scores, labels, strict=True)])


def test_ties_count_against_the_model() -> None:
    images, classes = np.ones((3, 2), dtype=np.float32), np.ones((4, 2), dtype=np.float32)
    ranks, predicted = answers(images, classes, np.array([0, 1, 3]))
    assert ranks.tolist() == [3, 3, 3]
    assert all(answer != own for answer, own in zip(predicted, [0, 1, 3], strict=True))


def test_of_classes_of_one_name_the_first_wins() -> None:
    # As by argmax in the original: 100 images of "missile" are right and 100 wrong, not all 200 wrong.
    names = ["dog", "missile", "cat", "missile", "missile"]
    alike = first_alike(names, protocol("plain"))
    assert alike.tolist() == [0, 1, 2, 1, 1]
    classes = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 1]]
    images = np.eye(3, dtype=np.float32)[[1, 1, 1, 0, 0]]
    ranks, predicted = answers(images, classes, np.array([1, 3, 4, 0, 3]), alike)
    assert predicted.tolist() == [1, 1, 1, 0, 0]
    assert ranks.tolist() == [0, 1, 2, 0, 3]
    # What a model could tell apart still counts against it.
    same = np.ones((5, 2), dtype=np.float32)
    assert answers(same, same, np.arange(5), alike)[0].tolist() == [4, 2, 4, 3, 4]


def test_mean_per_class_weighs_classes_alike_and_confusions_are_counted() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1])
    predicted = np.array([0, 0, 0, 1, 0, 0])
    ranks = np.where(labels == predicted, 0, 1)
    result = summarize(ranks, labels, np.arange(6), top5=False)
    assert result.values["top1"] == pytest.approx(0.5)
    assert result.values["mean_per_class"] == pytest.approx((3 / 4 + 0) / 2)
    details = per_class(ranks, predicted, labels, ["a", "b"])
    assert details["per_class"] == [[3, 4], [0, 2]]
    assert details["confusions"] == [[1, 0, 2], [0, 1, 1]]


def test_calibration_by_hand() -> None:
    sure = np.array([0.95, 0.95, 0.95, 0.95, 0.5, 0.5])
    hits = np.array([True, True, False, False, True, False])
    found = calibration(sure, hits)
    assert found.error == pytest.approx((4 * 0.45 + 0) / 6)
    assert found.count == [2, 4]
    assert found.accuracy == [0.5, 0.5]
    assert found.interval[0] <= found.error <= found.interval[1]
    images, classes = np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)
    assert confidences(images, classes, 3.0) == pytest.approx(np.exp(3) / (np.exp(3) + 1))


def test_what_a_user_may_write_wrongly() -> None:
    for tables, message in [
        ([], "names no evaluator: the suite is empty"),
        ([{"kind": "zero_shoot", "data": "x"}], "did you mean 'zero_shot'"),
        ([{"data": "x"}], "an evaluator needs a kind"),
        ([{"kind": "knn", "data": "x"}], "key train is missing"),
        ([{"kind": "zero_shot", "data": "x", "promts": "short"}], "unknown key promts .did you mean prompts"),
        ([{"kind": "zero_shot", "data": "x"}] * 2, "two evaluators named 'zero_shot'"),
        ([{"kind": "zero_shot", "name": "a/b", "data": "x"}], "must not hold a '/'"),
    ]:
        with pytest.raises(OpenVisionError, match=message):
            parse_evaluators(tables, "suite s")


def test_packages_may_bring_kinds(monkeypatch) -> None:
    class Unfinished(Evaluator):
        kind: str = "unfinished"

    class Other(Evaluator):
        kind: str = "other"

        def measure(self, model, root) -> Measured:
            return Measured({"answer": 42.0})

    brought = {"other": Other, "wrong": dict, "unfinished": Unfinished}
    points = [SimpleNamespace(name=name, load=lambda found=found: found) for name, found in brought.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    (found,) = parse_evaluators([{"kind": "other", "data": "x"}], "test")
    assert type(found) is Other
    with pytest.raises(OpenVisionError, match="gives no Evaluator"):
        parse_evaluators([{"kind": "wrong", "data": "x"}], "test")
    with pytest.raises(OpenVisionError, match="'unfinished' is not finished by its package"):
        parse_evaluators([{"kind": "unfinished", "data": "x"}], "test")
    with pytest.raises(OpenVisionError, match="did you mean 'other'"):
        parse_evaluators([{"kind": "othr", "data": "x"}], "test")


def test_features_that_are_no_numbers_name_the_evaluator(subject, fake_data) -> None:
    with torch.no_grad():
        subject.vision.head.weight[0, 0] = float("nan")
    with pytest.raises(OpenVisionError, match="evaluator 'names': 12 of 12 image features have NaN"):
        measured(subject, fake_data, ALL[0])


def test_a_tower_alone_is_probed_and_not_asked_for_texts(subject, fake_data) -> None:
    tower = EvaluatedModel(subject.vision)
    assert measured(tower, fake_data, ALL[4])["knn"].values
    with pytest.raises(OpenVisionError, match="no text tower"):
        measured(tower, fake_data, ALL[0])


def broken_images(count: int, bad: set[int]) -> ImageSet:
    def load(index: int):
        if index in bad:
            raise BadSampleError("undecodable", "no image")
        return np.full((40, 40, 3), 10 * index, dtype=np.uint8)

    return ImageSet("set", [str(index) for index in range(count)], load, f"{count} {bad}")


def test_a_bad_image_is_left_out_and_many_are_an_error(subject) -> None:
    encoded = subject.encode(broken_images(7, {2}))
    assert encoded.rows.tolist() == [0, 1, 3, 4, 5, 6]
    assert encoded.rejected == 1
    whole = subject.encode(broken_images(7, set()))
    assert np.allclose(whole.pooled[encoded.rows], encoded.pooled, atol=1e-6)
    with pytest.raises(OpenVisionError, match="2 of 7 images of set cannot be decoded"):
        subject.encode(broken_images(7, {2, 3}))


def test_images_beyond_the_largest_bucket_are_not_called_undecodable(subject) -> None:
    sizes = [(40, 40), (20, 200), (40, 80), (200, 20)]
    images = ImageSet("set", list("abcd"), lambda index: np.zeros((*sizes[index], 3), dtype=np.uint8), "elongated")
    native = replace(subject, preprocessing="native")
    with pytest.raises(OpenVisionError, match=r"2 of 4 images of set are left out.*whose sides are .* to .*; crop it"):
        native.encode(images)
    assert native.encode(take(images, [0, 1, 2])).rows.tolist() == [0, 2]


def test_images_are_prepared_ahead_in_order(subject) -> None:
    batches = list(prepared_batches(broken_images(13, set()), range(13), subject, 5))
    assert [len(batch) for _, batch in batches] == [5, 5, 3]
    shades = torch.cat([batch for _, batch in batches])[:, 0, 0, 0].tolist()
    # Resizing truncates, by one grey level at most.
    assert shades == pytest.approx([10 * index for index in range(13)], abs=1)


WORKER = """
import json, sys
import torch.distributed as dist
from pathlib import Path
from openvision.evaluation.evaluators.in_training import measure_in_training
from openvision.evaluation.evaluators.base import parse_evaluators
from openvision.weights.folder import load_folder
rank, world, store, model, data, tables = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
loaded, tokenizer, _ = load_folder(Path(model))
evaluators = parse_evaluators(json.loads(tables), "test")
print(json.dumps(measure_in_training(evaluators, loaded, tokenizer, data, 32, batch_size=3)))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does(fake_run, fake_data, tmp_path) -> None:
    model, tokenizer, _ = load_folder(fake_run / "model")
    alone = measure_in_training(parse_evaluators(ALL, "test"), model, tokenizer, fake_data, 32)
    arguments = [str(tmp_path / "store"), str(fake_run / "model"), str(fake_data), json.dumps(ALL)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), "2", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    printed = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]

    def real(name: str) -> bool:
        """Whether a number is a mean of floats, which depends on the order of summation."""
        return "ece" in name or "caption" in name

    assert printed[0] == printed[1]
    assert printed[0] == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert {name: value for name, value in printed[0].items() if not real(name)} == {
        name: value for name, value in alone.items() if not real(name)
    }


def test_when_evaluators_are_due() -> None:
    often, usual = parse_evaluators(
        [{"kind": "zero_shot", "name": "a", "data": "x", "every": 2}, {"kind": "zero_shot", "name": "b", "data": "x"}],
        "test",
    )
    assert due([often, usual], 4, 5, last=False) == [often]
    assert due([often, usual], 5, 5, last=False) == [usual]
    assert due([often, usual], 7, 5, last=False) == []
    assert due([often, usual], 7, 5, last=True) == [often, usual]


def test_in_training_the_mode_stays_and_lines_are_flat(fake_run, fake_data) -> None:
    model, tokenizer, _ = load_folder(fake_run / "model")
    model.train()
    beats = []
    numbers = measure_in_training(
        parse_evaluators([ALL[0], ALL[4]], "test"), model, tokenizer, fake_data, 16, beat=beats.append
    )
    assert model.training
    assert beats == ["measuring names", "measuring knn"]
    assert {"names/top1", "names/ece", "knn/top1"} <= numbers.keys()
    assert all(isinstance(value, float) for value in numbers.values())
    with evaluating(model):
        assert not model.training


def test_before_training_missing_data_are_told(fake_data) -> None:
    missing = parse_evaluators([{"kind": "knn", "data": "train", "train": "nowhere"}], "test")
    with pytest.raises(OpenVisionError, match=r"evaluator 'knn': .*nowhere is missing"):
        check_evaluators(missing, fake_data, has_text=False)
    with pytest.raises(OpenVisionError, match=r"'zero_shot' .* needs a text tower"):
        check_evaluators(parse_evaluators([{"kind": "zero_shot", "data": "train"}], "t"), fake_data, has_text=False)
    check_evaluators(parse_evaluators(ALL, "test"), fake_data, has_text=True)
    captions = parse_evaluators([{"kind": "caption_loss", "data": "train"}], "t")
    with pytest.raises(OpenVisionError, match="needs a caption decoder"):
        check_evaluators(captions, fake_data, has_text=True, has_decoder=False)


def test_which_way_is_better() -> None:
    assert [less_is_better(name) for name in ("a/ece", "loss", "a/t2i_median", "a/top1", "loss/top1")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_metrics_line_prefixes(subject, fake_data) -> None:
    results = list(measure_all(parse_evaluators([ALL[4]], "t"), subject, fake_data))
    assert metrics_line(results) == {f"knn/{name}": value for name, value in results[0][1].values.items()}


def test_a_class_the_probe_never_saw(subject, fake_data, tmp_path) -> None:
    table = {"kind": "knn", "data": "heldout_compositional", "train": "train", "label": "name"}
    assert labelled_shards(fake_data / "train", "name").classes
    with pytest.raises(OpenVisionError, match="is not among those of train"):
        measured(subject, fake_data, table)

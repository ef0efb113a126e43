"""OpenVision 2 and GenLIP train by the caption alone, measure its loss and resume where they were stopped."""

import copy

import numpy as np
import pytest
import torch

import openvision
from openvision.data.shards.dataset import ShardDataset
from openvision.errors import OpenVisionError
from openvision.evaluation.suites.own import suite_of_run
from openvision.files import read_json_lines
from openvision.models.genlip import GenLip
from openvision.models.openvision2 import OpenVision2
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.training import step
from openvision.training.trainer import Interrupted, Trainer
from openvision.training.validation import headline, validate
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.load import load_checkpoint

VISION = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "patch_size": 8, "image_size": 32}
DECODER = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "vocab_size": 128, "caption_length": 24}
RECIPE = {
    "name": "tiny2",
    "model": {"kind": "openvision2", "vision": VISION, "decoder": DECODER, "keep_ratio": 0.5},
    "loss": {"contrastive": 0, "caption": 2, "texts": []},
    "data": {"train": "train", "validation": "validation", "vocab_size": 128},
    "stages": [
        {"resolution": 16, "samples": 64, "batch_size": 8, "base_learning_rate": 0.03, "warmup_samples": 16},
        {"resolution": 32, "samples": 32, "batch_size": 8, "base_learning_rate": 0.01, "micro_batches": 2},
    ],
    "run": {"log_every": 2, "evaluate_every": 4, "checkpoint_every": 3, "precision": "float32"},
}


MODELS = {
    "openvision2": RECIPE["model"],
    "genlip": {
        "kind": "genlip",
        "vision": VISION,
        "decoder": {"width": 24, "vocab_size": 128, "caption_length": 24},
    },
}


def recipe(kind: str) -> Recipe:
    return parse_recipe(copy.deepcopy(RECIPE) | {"model": MODELS[kind]}, kind)


@pytest.fixture(scope="module", params=MODELS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def finished(kind, tmp_path_factory, shapes_folder) -> Trainer:
    trainer = Trainer(recipe(kind), shapes_folder, tmp_path_factory.mktemp("v2") / "run")
    trainer.run()
    return trainer


def test_it_learns_and_measures_its_caption_loss(finished):
    lines = read_json_lines(finished.parts.folder / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert train[-1]["caption"] < train[0]["caption"]
    assert train[-1]["loss"] == pytest.approx(2 * train[-1]["caption"])
    assert not {"contrastive", "logit_scale"} & train[-1].keys()
    measured = [line["caption_loss"] for line in lines if line["kind"] == "eval"]
    assert len(measured) == 3
    assert measured[-1] < measured[0]
    assert headline({"caption_loss": 1.5, "images": 8, "rejected": 0}) == "validation caption loss 1.5000"


def test_validation_reads_all_patches_and_leaves_the_mode(finished, shapes_folder):
    model, split = finished.parts.model.module, ShardDataset(shapes_folder / "validation")
    assert isinstance(model, OpenVision2 | GenLip)
    model.train()
    lines = read_json_lines(finished.parts.folder / "metrics.jsonl")
    logged = [line["caption_loss"] for line in lines if line["kind"] == "eval"][-1]
    measured = validate(model, finished.parts.tokenizer, split, 32)
    assert measured == {"caption_loss": pytest.approx(logged, abs=1e-5), "images": len(split), "rejected": 0}
    assert model.training


def test_images_that_validation_leaves_out_are_told():
    """The number is of fewer images than the shards hold."""
    left_out = "; 21 of 40 images left out, unreadable or too elongated"
    counts = {"images": 19, "rejected": 21}
    assert headline({"caption_loss": 1.5, **counts}) == f"validation caption loss 1.5000{left_out}"
    assert headline({"top1": 0.25, "top5": 0.5, **counts}) == f"validation zero-shot top-1 25.0%, top-5 50.0%{left_out}"


def test_a_stopped_run_goes_on_bit_for_bit(kind, finished, shapes_folder, tmp_path, monkeypatch):
    trainer = Trainer(recipe(kind), shapes_folder, tmp_path / "run")
    forward_backward = step.forward_backward

    def ask_to_stop_during_the_step(*arguments):
        if trainer.progress.step == 6:
            trainer.stop.ask()
        return forward_backward(*arguments)

    monkeypatch.setattr(step, "forward_backward", ask_to_stop_during_the_step)
    with pytest.raises(Interrupted):
        trainer.run()
    monkeypatch.undo()
    again = Trainer(recipe(kind), shapes_folder, tmp_path / "run")
    again.run()
    for name, tensor in finished.parts.model.module.state_dict().items():
        assert torch.equal(again.parts.model.module.state_dict()[name], tensor), name


def test_the_model_folder_is_used_like_any_other(kind, finished, shapes_folder, tmp_path):
    """Features, captions, an average that is exported, probes of the suite, and what it cannot do, in a sentence."""
    folder = finished.parts.folder / "model"
    images = [np.full((40, 40, 3), shade, dtype=np.uint8) for shade in (0, 200)]
    captioner = openvision.load_captioner(folder)
    assert len(captioner.caption(images, max_length=5)) == 2
    tower = openvision.load_vision(folder)
    found = tower.forward_features(images)
    torch.testing.assert_close(captioner.forward_features(images).patch_tokens, found.patch_tokens)
    assert found.patch_tokens.shape == (2, 16, 32)
    assert tower.encode_unit(images).shape == (2, 32)
    with pytest.raises(OpenVisionError, match="without a text tower"):
        openvision.load(folder)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.captioner is not None
    export(checkpoint, "safetensors", tmp_path / "copy", ExportOptions(resolution=48))
    assert openvision.load_captioner(tmp_path / "copy").num_patches == 36
    if kind == "genlip":
        with pytest.raises(OpenVisionError, match="rotary positions and gated attention, for which timm has no class"):
            export(checkpoint, "timm", tmp_path / "timm")
    results = suite_of_run(finished.parts.folder, shapes_folder)[0]
    assert [type(one).__name__ for one in results.evaluators] == ["CaptionLoss"]


def test_accumulation_that_does_not_divide_the_batch_is_refused():
    wrong = copy.deepcopy(RECIPE)
    wrong["stages"][0]["micro_batches"] = 3
    with pytest.raises(OpenVisionError, match="batch_size 8 is not divisible by micro_batches 3"):
        parse_recipe(wrong, "tiny2")

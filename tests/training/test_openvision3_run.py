"""OpenVision 3 trains all of its losses, resumes bit for bit with its noise, and leaves the autoencoder alone."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from openvision.errors import OpenVisionError
from openvision.files import read_json_lines
from openvision.frozen.autoencoder import open_autoencoder
from openvision.frozen.conv import ConvAutoencoder, ConvConfig, save_conv
from openvision.models.openvision3 import OpenVision3, OpenVision3Config
from openvision.objectives.caption import caption_loss
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.recipe.smoke import smoke_recipe
from openvision.training import objective, step
from openvision.training.objective import UnifiedObjective
from openvision.training.randomness import SampleRandomness
from openvision.training.trainer import Interrupted, Trainer
from openvision.weights.load import load_checkpoint
from tests.training.small_step import batch_of, randomness_of, recipe_of, run

TOWER = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}
RECIPE = {
    "name": "tiny3",
    "model": {
        "kind": "openvision3",
        "embed_dim": 16,
        "vision": {**TOWER, "patch_size": 16, "image_size": 64},
        "text": {**TOWER, "vocab_size": 128, "context_length": 12},
        "decoder": {**TOWER, "vocab_size": 128, "caption_length": 24},
        "reconstruction": {**TOWER, "noise": 0.5, "decoded_at_once": 4},
    },
    "loss": {"caption": 1.0, "texts": ["sentence"], "reconstruction": {"perceptual": "efficientnet-lite0"}},
    "augment": {"jitter": 0.0, "grayscale_probability": 0.0},
    "data": {"train": "train", "validation": "validation", "vocab_size": 128},
    "stages": [
        {"resolution": 32, "samples": 128, "batch_size": 8, "base_learning_rate": 0.03, "warmup_samples": 16},
        {"resolution": 64, "samples": 32, "batch_size": 8, "base_learning_rate": 0.01, "perceptual": 0.5},
    ],
    "run": {"log_every": 2, "evaluate_every": 8, "checkpoint_every": 3, "precision": "float32"},
}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ae") / "ae"
    torch.manual_seed(0)
    save_conv(folder, ConvAutoencoder(ConvConfig(widths=(8, 8, 8))), 1.0, {})
    return folder


@pytest.fixture(scope="module")
def recipe(autoencoder) -> Recipe:
    table = copy.deepcopy(RECIPE)
    table["model"]["vision"]["autoencoder"] = {"kind": "conv", "source": str(autoencoder), "scale": 1.0}
    return parse_recipe(table, "tiny3")


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory, shapes_folder) -> Trainer:
    trainer = Trainer(recipe, shapes_folder, tmp_path_factory.mktemp("v3") / "run")
    trainer.run()
    return trainer


def model_of(recipe: Recipe) -> OpenVision3:
    assert isinstance(recipe.model, OpenVision3Config)
    return OpenVision3(recipe.model)


def lines_of(trainer: Trainer, kind: str) -> list:
    return [line for line in read_json_lines(trainer.parts.folder / "metrics.jsonl") if line["kind"] == kind]


def test_all_of_its_losses_fall(finished):
    first, *_, last = [line for line in lines_of(finished, "train") if line["stage"] == 0]
    for term in ("caption", "pixels", "latents"):
        assert last[term] < first[term], term
    assert last["loss"] == pytest.approx(
        last["contrastive"] + last["caption"] + 0.5 * (last["pixels"] + 0.4 * last["latents"]), rel=1e-5
    )
    assert "perceptual" not in last
    assert first["token_rms"] > 0
    second = lines_of(finished, "train")[-1]
    assert second["loss"] == pytest.approx(
        second["contrastive"]
        + second["caption"]
        + 0.5 * (second["pixels"] + 0.4 * second["latents"] + 0.5 * second["perceptual"]),
        rel=1e-5,
    )
    assert {"top1", "t2i_r1"} <= lines_of(finished, "eval")[-1].keys()


def test_the_autoencoder_is_neither_trained_nor_stored_as_a_parameter(finished, recipe, autoencoder):
    assert isinstance(recipe.model, OpenVision3Config)
    opened = open_autoencoder(recipe.model.vision.autoencoder)
    torch.manual_seed(0)
    fresh = ConvAutoencoder(ConvConfig(widths=(8, 8, 8)))
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(opened.network.state_dict()[name], tensor), name
    loaded = load_checkpoint(finished.model_folder)
    assert loaded.unified is not None
    names = set(loaded.unified.state_dict())
    assert {name.split(".")[0] for name in names} == {"vision", "text", "decoder", "reconstruction", "logit_scale"}
    assert (finished.model_folder / "autoencoder" / "model.safetensors").is_file()


def test_a_stopped_run_resumes_bit_for_bit_noise_included(finished, recipe, shapes_folder, tmp_path, monkeypatch):
    trainer = Trainer(recipe, shapes_folder, tmp_path / "run")
    forward_backward = step.forward_backward

    def ask_to_stop_during_the_step(*arguments):
        if trainer.progress.step == 6:
            trainer.stop.ask()
        return forward_backward(*arguments)

    monkeypatch.setattr(step, "forward_backward", ask_to_stop_during_the_step)
    with pytest.raises(Interrupted):
        trainer.run()
    monkeypatch.undo()
    again = Trainer(recipe, shapes_folder, tmp_path / "run")
    again.run()
    for name, tensor in finished.parts.model.module.state_dict().items():
        assert torch.equal(again.parts.model.module.state_dict()[name], tensor), name


def test_the_first_stage_never_opens_the_perceptual_network(monkeypatch):
    monkeypatch.setattr(objective, "open_perceptual", lambda *_: pytest.fail("opened"))
    recipe = recipe_of("openvision3")
    run(model_of(recipe), recipe, 1, randomness_of())


def test_noise_is_a_function_of_seed_and_position_within_its_bounds():
    randomness = SampleRandomness(3, np.arange(100, 400))
    noise = randomness.token_noise(16, 32, 0.8, torch.device("cpu"))
    deviations = noise.std(dim=(1, 2))
    assert deviations.max() < 0.9
    assert deviations.min() < 0.05
    assert deviations.mean() == pytest.approx(0.4, abs=0.05)
    normal = noise / deviations[:, None, None]
    assert normal.mean().abs() < 0.01
    assert (normal**4).mean() == pytest.approx(3, abs=0.1)
    assert torch.equal(randomness.rows(slice(7, 20)).token_noise(16, 32, 0.8, torch.device("cpu")), noise[7:20])
    other = SampleRandomness(4, randomness.positions).token_noise(16, 32, 0.8, torch.device("cpu"))
    assert not torch.equal(other, noise)


def test_without_reconstruction_it_is_version_1s_contrast_and_version_2s_caption():
    """The understanding branch bit for bit, computed by the parts of the other versions."""
    recipe = recipe_of("openvision3")
    model = model_of(recipe)
    batch = batch_of()
    unified = UnifiedObjective(model, recipe.loss, 1)
    embeds, terms = unified.forward(batch, randomness_of(), batch.label_mask.sum())
    terms |= unified.coupled(embeds, batch)
    features = model.vision.forward_features(batch.images)
    ids = torch.cat([torch.ones(8, 1, dtype=torch.long), batch.labels[:, :-1]], dim=1)
    states = model.decoder(features.patch_tokens, ids)
    caption = caption_loss(
        states, batch.labels, batch.label_mask, model.decoder.head.weight, count=batch.label_mask.sum()
    )
    assert terms["caption"].item() == pytest.approx(caption.item(), rel=1e-6)
    images, texts = model.encode_image(batch.images), model.encode_text(batch.sentence_ids)
    logits = model.logit_scale.exp() * images @ texts.T
    target = torch.arange(8)
    contrast = (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    assert terms["contrastive"].item() == pytest.approx(contrast.item(), rel=1e-5)


def test_a_weight_of_zero_measures_and_does_not_train():
    recipe = recipe_of("openvision3")
    assert recipe.loss.reconstruction is not None
    silent = recipe.loss.reconstruction.model_copy(update={"weight": 0.0})
    recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"reconstruction": silent})})
    terms, gradients = run(model_of(recipe), recipe, 1, randomness_of())
    assert terms["pixels"] > 0
    assert gradients["reconstruction.head.weight"].abs().max() == 0
    assert gradients["vision.patch_embed.proj.weight"].abs().max() > 0


def test_pixels_of_one_sample_in_two_are_those_of_half_the_batch():
    recipe = recipe_of("openvision3")
    model = model_of(recipe)
    batch, randomness = batch_of(), randomness_of()
    _, terms = UnifiedObjective(model, recipe.loss, 1).forward(batch, randomness, batch.label_mask.sum())
    model.config = replace(model.config, reconstruction=replace(model.config.reconstruction, pixels_of=1))
    even = replace(
        batch, **{n: getattr(batch, n)[::2] for n in ("images", "sentence_ids", "alt_ids", "labels", "label_mask")}
    )
    half = replace(randomness, positions=randomness.positions[::2])
    _, alone = UnifiedObjective(model, recipe.loss, 1).forward(even, half, even.label_mask.sum())
    assert terms["pixels"].item() == pytest.approx(alone["pixels"].item(), rel=1e-6)


def test_the_smoke_form_needs_no_weights_of_others(recipe):
    smoke = smoke_recipe(recipe)
    assert isinstance(smoke.model, OpenVision3Config)
    assert smoke.model.vision.autoencoder.kind == "pixels"
    assert smoke.loss.reconstruction is not None
    assert smoke.loss.reconstruction.perceptual == "efficientnet-lite0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"texts": ["sentence"]}}, r"add \[loss.reconstruction\]"),
        ({"stages": [{**RECIPE["stages"][0], "resolution": 40}]}, "resolution 40 is no multiple of 16 px"),
        ({"stages": [{**RECIPE["stages"][1], "resolution": 16}]}, "too small for a perceptual distance"),
        ({"model": {"kind": "openvision4"}}, "choose one of openvision, openvision2, openvision3"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(change, message, recipe):
    table = {**recipe.model_dump(mode="json", exclude_none=True), **change}
    if "stages" in change:
        table["model"] = copy.deepcopy(table["model"])
        table["model"]["vision"]["image_size"] = 16 * (change["stages"][0]["resolution"] // 16)
    with pytest.raises(OpenVisionError, match=message):
        parse_recipe(table, "wrong")


def test_the_other_kinds_have_no_reconstruction(tiny_recipe):
    table = tiny_recipe.model_dump(mode="json", exclude_none=True)
    table["loss"]["reconstruction"] = {}
    with pytest.raises(OpenVisionError, match="of OpenVision 3 alone"):
        parse_recipe(table, "wrong")


def test_weights_that_a_later_stage_lacks_end_the_run_before_its_first_step(recipe, shapes_folder, tmp_path):
    table = recipe.model_dump(mode="json", exclude_none=True)
    table["loss"]["reconstruction"] |= {"perceptual": "lpips", "folder": str(tmp_path)}
    with pytest.raises(OpenVisionError, match="holds no backbone for LPIPS"):
        Trainer(parse_recipe(table, "tiny3"), shapes_folder, tmp_path / "run")
    table["model"]["vision"]["autoencoder"]["source"] = str(tmp_path / "gone")
    with pytest.raises(OpenVisionError, match="train one with `openvision autoencoder`"):
        Trainer(parse_recipe(table, "tiny3"), shapes_folder, tmp_path / "run")


def test_data_without_captions_is_refused(recipe, shapes_folder, tmp_path):
    table = recipe.model_dump(mode="json", exclude_none=True)
    table["data"]["synthetic_key"] = "captions"
    with pytest.raises(OpenVisionError, match="captions"):
        Trainer(parse_recipe(table, "tiny3"), shapes_folder, tmp_path / "run")

"""Masked prediction of patches: exact in micro-batches and after a stop, and nothing of it is exported."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from openvision.errors import OpenVisionError
from openvision.files import read_json_lines
from openvision.models.openvision2 import random_patches
from openvision.objectives.masked_prediction import patch_targets
from openvision.recipe.schema import Recipe, load_recipe, parse_recipe
from openvision.runtime import SINGLE_PROCESS
from openvision.training.dense import PREDICTOR, DenseObjective, DensePredictor, with_dense
from openvision.training.objective import build_objective
from openvision.training.setup.model import build_distributed_model
from openvision.training.step import forward_backward
from openvision.training.trainer import Interrupted, Trainer
from tests.conftest import TINY_RECIPE
from tests.training.small_step import batch_of, randomness_of, recipe_of

TABLE = {"weight": 0.5, "mask": 0.4, "decay": 0.9}


def dense_recipe(kind: str, **vision: object) -> Recipe:
    content: dict[str, Any] = recipe_of(kind).model_dump() | {"dense": TABLE}
    content["model"]["vision"] |= vision
    return parse_recipe(content, "test")


def objective_of(recipe: Recipe, double: bool = False):
    model = build_distributed_model(
        recipe.model, recipe.run, recipe.parallel, SINGLE_PROCESS, recipe.seed, dense=recipe.dense
    )
    if double:
        model.module.double()
    return model, with_dense(build_objective(model, recipe.loss, bos_id=1), model, recipe.dense)


def step(recipe: Recipe, micro_batches: int = 1, double: bool = False):
    model, objective = objective_of(recipe, double)
    losses = forward_backward(model, objective, batch_of(), randomness_of(0.3), torch.float32, micro_batches)
    return losses.terms, {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["openvision", "clip", "openvision2"])
def test_micro_batches_equal_the_batch(kind):
    recipe = dense_recipe(kind)
    terms, gradients = step(recipe, 1, double=True)
    cached_terms, cached_gradients = step(recipe, 4, double=True)
    assert terms.keys() == cached_terms.keys()
    for name, value in terms.items():
        torch.testing.assert_close(cached_terms[name], value, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == cached_gradients.keys()
    trained = {name for name in gradients if name.startswith(PREDICTOR)}
    assert f"{PREDICTOR}.mask_token" in trained
    assert not [name for name in trained if "averaged" in name]
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", ["openvision", "openvision2"])
def test_the_weight_enters_the_total_and_the_rest_is_as_without(kind):
    recipe, plain = dense_recipe(kind), recipe_of(kind)
    terms, _ = step(recipe)
    model = build_distributed_model(plain.model, plain.run, plain.parallel, SINGLE_PROCESS, plain.seed)
    objective = build_objective(model, plain.loss, bos_id=1)
    assert with_dense(objective, model, plain.dense) is objective, "off is off"
    alone = forward_backward(model, objective, batch_of(), randomness_of(0.3), torch.float32, 1).terms
    assert all(torch.equal(terms[name], value) for name, value in alone.items() if name != "loss")
    torch.testing.assert_close(terms["loss"], alone["loss"] + 0.5 * terms["dense"])


def test_the_term_is_the_distance_at_masked_patches():
    recipe = dense_recipe("clip", registers=2)
    model, objective = objective_of(recipe)
    assert isinstance(objective, DenseObjective)
    batch, randomness = batch_of(), randomness_of(0.0)
    _, terms = objective.forward(batch, randomness, torch.tensor(1.0))
    vision, predictor = model.module.vision, objective.predictor
    hidden = random_patches(randomness.positions, 16, 0.4, randomness.seed ^ 0x6D61736B)
    assert hidden.shape == (8, 6), "0.4 of 16"
    with torch.no_grad():
        patches = vision.patch_embed(vision.inputs(batch.images))
        patches[torch.arange(8)[:, None], hidden] = predictor.mask_token
        x = vision.with_prefix(patches + vision.position_table(4, 4, patches.device))
        for block in vision.blocks:
            x = block(x)
        predicted = predictor.head(x[:, 3:])
        tokens = predictor.averaged.forward_features(batch.images).patch_tokens
        wanted = (tokens - tokens.mean(1, keepdim=True)) / (tokens.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        distance = 1 - F.cosine_similarity(predicted, wanted, dim=-1)
        torch.testing.assert_close(terms["dense"], distance.gather(1, hidden).mean())


def test_a_small_step_against_the_gradient_predicts_better():
    model, objective = objective_of(dense_recipe("clip"))
    batch, randomness, one = batch_of(), randomness_of(0.0), torch.tensor(1.0)
    before = objective.forward(batch, randomness, one)[1]["dense"]
    before.backward()
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    assert objective.forward(batch, randomness, one)[1]["dense"] < before


def test_targets_are_what_sets_a_patch_apart():
    tokens = torch.randn(2, 5, 3) * 4 + 7
    tokens[..., 0] = 2.0
    found = patch_targets(tokens.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found[..., 0], torch.zeros(2, 5))
    torch.testing.assert_close(patch_targets(tokens)[..., 1:].std(dim=1, correction=0), torch.ones(2, 2))
    # A sample alone is like a sample of a batch.
    torch.testing.assert_close(patch_targets(tokens)[:1], patch_targets(tokens[:1]))


def test_the_average_begins_with_the_tower_and_follows_it():
    model, objective = objective_of(dense_recipe("clip", pool="map"))
    assert isinstance(objective, DenseObjective)
    vision, averaged = model.module.vision, objective.predictor.averaged
    trained = dict(vision.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in averaged.named_parameters())
    before = vision.cls_token.detach().clone()
    with torch.no_grad():
        vision.cls_token.add_(1.0)
    objective.follow()
    torch.testing.assert_close(averaged.cls_token, before + 0.1)


def run_recipe(**changes: Any) -> Recipe:
    changed: dict[str, Any] = copy.deepcopy(TINY_RECIPE) | {"dense": TABLE | {"decay": 0.8}} | changes
    changed["stages"][0]["micro_batches"] = 2
    changed["optimizer"] = {"ema": 0.9}
    return parse_recipe(changed, "tiny")


def test_a_run_resumes_exactly(shapes_folder, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Trainer(run_recipe(), shapes_folder, whole).run()
    first = Trainer(run_recipe(), shapes_folder, stopped)
    first.stop.wanted = True
    with pytest.raises(Interrupted):
        first.run()
    Trainer(run_recipe(), shapes_folder, stopped).run()
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(name.startswith(PREDICTOR) for name in a)
    train = [line for line in read_json_lines(whole / "metrics.jsonl") if line["kind"] == "train"]
    assert all(0 < line["dense"] < 2 for line in train)
    assert len({line["resolution"] for line in train}) > 1, "stages of several resolutions"
    assert load_recipe(whole / "recipe.toml").dense == run_recipe().dense


def test_a_run_starts_its_average_from_the_weights_it_is_given(shapes_folder, tmp_path):
    Trainer(parse_recipe(copy.deepcopy(TINY_RECIPE), "tiny"), shapes_folder, tmp_path / "start").run()
    data = {key: value for key, value in TINY_RECIPE["data"].items() if key != "vocab_size"}
    parts = Trainer(run_recipe(start=str(tmp_path / "start"), data=data), shapes_folder, tmp_path / "run").parts
    predictor = parts.model.module.get_submodule(PREDICTOR)
    assert isinstance(predictor, DensePredictor)
    given = load_file(tmp_path / "start" / "model" / "model.safetensors")
    for name, value in predictor.averaged.named_parameters():
        assert torch.equal(value, given[f"vision.{name}"])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("openvision3", {}, "OpenVision 3 reconstructs its patches already"),
        ("clip", {"teacher": [{"source": "x"}]}, "teachers take the same place"),
        ("clip", {"warm_start": {"frozen": ["vision"]}}, "dense trains the vision tower"),
        ("clip", {"parallel": {"mode": "fsdp"}}, 'use parallel.mode = "ddp"'),
        ("clip", {"dense": {"weight": 0}}, "dense.weight"),
        ("clip", {"dense": {"mask": 1.0}}, "dense.mask"),
        ("clip", {"dense": {"masks": 0.5}}, r"unknown key dense.masks \(did you mean mask"),
    ],
)
def test_what_does_not_go_together_is_named(kind, change, message):
    with pytest.raises(OpenVisionError, match=message):
        parse_recipe(recipe_of(kind).model_dump() | {"dense": TABLE} | change, "bad")

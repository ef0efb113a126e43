"""Masked prediction of patches: exact in micro-batches and after a stop, and nothing of it is exported."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from openvision.errors import OpenVisionError
from openvision.files import read_json_lines
from openvision.models.openvision2 import random_patches
from openvision.objectives.dense import crop_boxes, crop_grid, patch_targets, read_crops
from openvision.recipe.schema import Recipe, load_recipe, parse_recipe
from openvision.runtime import SINGLE_PROCESS
from openvision.training.dense import PREDICTOR, DenseObjective, DensePredictor, with_dense
from openvision.training.objective import build_objective
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.model import build_distributed_model
from openvision.training.step import forward_backward
from openvision.training.trainer import Interrupted, Trainer
from tests.conftest import TINY_RECIPE
from tests.training.small_step import batch_of, randomness_of, recipe_of

TABLE = {"weight": 0.5, "mask": 0.4, "decay": 0.9}
CROPS = {"kind": "crops", "weight": 0.5, "decay": 0.9}
STAGE = {"resolution": 32, "samples": 8, "batch_size": 8, "base_learning_rate": 0.01}
TABLES = {"masked": TABLE, "crops": CROPS}


def dense_recipe(kind: str, table: dict[str, Any] = TABLE, **vision: object) -> Recipe:
    content: dict[str, Any] = recipe_of(kind).model_dump() | {"dense": table}
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


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("openvision", "masked"),
        ("clip", "masked"),
        ("openvision2", "masked"),
        ("clip", "crops"),
        ("openvision2", "crops"),
    ],
)
def test_micro_batches_equal_the_batch(kind, table):
    recipe = dense_recipe(kind, TABLES[table])
    terms, gradients = step(recipe, 1, double=True)
    cached_terms, cached_gradients = step(recipe, 4, double=True)
    assert terms.keys() == cached_terms.keys()
    for name, value in terms.items():
        torch.testing.assert_close(cached_terms[name], value, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == cached_gradients.keys()
    trained = {name for name in gradients if name.startswith(PREDICTOR)}
    assert (f"{PREDICTOR}.mask_token" in trained) == (table == "masked")
    assert f"{PREDICTOR}.head.3.weight" in trained
    assert not [name for name in trained if "averaged" in name]
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(("kind", "table"), [("openvision", TABLE), ("openvision2", CROPS)])
def test_the_weight_enters_the_total_and_the_rest_is_as_without(kind, table):
    recipe, plain = dense_recipe(kind, table), recipe_of(kind)
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


def test_crops_are_predicted_where_they_lie():
    recipe = dense_recipe("clip", CROPS | {"crop_area": (0.25, 0.25)}, registers=2)
    model, objective = objective_of(recipe)
    assert isinstance(objective, DenseObjective)
    batch, randomness = batch_of(), randomness_of(0.0)
    _, terms = objective.forward(batch, randomness, torch.tensor(1.0))
    vision, predictor = model.module.vision, objective.predictor
    rows, columns = vision.grid_of(batch.images)
    side = rows // 2
    # A quarter of the area at half of the resolution: pixels are shifted by a part of one, and not scaled.
    numbers = randomness.crop_numbers()
    with torch.no_grad():
        tokens = predictor.averaged.forward_features(batch.images).patch_tokens
        wanted = (tokens - tokens.mean(1, keepdim=True)) / (tokens.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        wanted, pixels = wanted.unflatten(1, (rows, columns)), vision.inputs(batch.images)
        patch, distances = vision.config.patch_size, []
        for index, (_, column, row) in enumerate(numbers.tolist()):
            places = [torch.arange(side) + rows / 2 * start for start in (row, column)]
            targets = bilinear(wanted[index], *places)
            exact = [torch.arange(side * patch) + rows * patch / 2 * start for start in (row, column)]
            crop = bilinear(pixels[index].permute(1, 2, 0), *exact).permute(2, 0, 1)
            predicted = predictor.head(vision.forward_features(crop[None]).patch_tokens)[0]
            distances.append((1 - F.cosine_similarity(predicted, targets.flatten(0, 1), dim=-1)).mean())
        torch.testing.assert_close(terms["dense"], torch.stack(distances).mean(), rtol=1e-4, atol=1e-4)


def bilinear(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(H, W, C) at fractional rows and columns, written out."""
    for dim, places in enumerate((rows, columns)):
        low = places.floor().long()
        share = (places - low).view(-1, *(1,) * (2 - dim))
        low, high = low, (low + 1).clamp(max=values.shape[dim] - 1)
        values = values.index_select(dim, low) * (1 - share) + values.index_select(dim, high) * share
    return values


def test_every_sample_has_a_crop_of_its_own_whatever_the_batch():
    randomness = SampleRandomness(3, np.arange(6))
    numbers = randomness.crop_numbers()
    assert len(numbers.unique()) == numbers.numel() == 18
    assert torch.equal(randomness.rows(slice(2, 5)).crop_numbers(), numbers[2:5])
    assert not (SampleRandomness(4, np.arange(6)).crop_numbers() == numbers).any(), "another seed"


@pytest.mark.parametrize(("kind", "accepted"), [("masked", True), ("crops", False)])
def test_a_panorama_of_one_row_has_patches_to_mask_and_none_to_crop(kind, accepted):
    stage = STAGE | {"native": {"max_tokens": 16, "buckets": [0.0625, 1.0, 16.0]}}
    content = recipe_of("clip").model_dump() | {"dense": {"kind": kind}, "stages": [stage]}
    if accepted:
        assert parse_recipe(content, "panorama").dense is not None
    else:
        with pytest.raises(OpenVisionError, match="has 1 patch, and kind"):
            parse_recipe(content, "panorama")


def test_crops_lie_inside_and_have_the_area_that_is_asked_for():
    uniform = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    boxes = crop_boxes(uniform, (0.25, 0.75))
    sides = boxes[:, 0, 0]
    assert torch.equal(sides, boxes[:, 1, 1]), "the image's own aspect"
    assert 0.25 <= (sides**2).min() < 0.27
    assert 0.73 < (sides**2).max() <= 0.75
    for axis in (0, 1):
        edges = boxes[:, axis, 2].abs() + sides
        assert edges.max() <= 1 + 1e-6
    whole = crop_boxes(uniform, (1.0, 1.0))
    maps = torch.randn(500, 2, 4, 6)
    torch.testing.assert_close(read_crops(maps, whole, (4, 6)), maps)
    exact = read_crops(maps, boxes, (2, 3))
    # A map of places says where a crop was read.
    places = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")).expand(500, -1, -1, -1)
    middle = read_crops(places, boxes, crop_grid((4, 6))).mean(dim=(2, 3))
    torch.testing.assert_close(middle[:, 1], (boxes[:, 0, 2] + 1) * 3 - 0.5, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(middle[:, 0], (boxes[:, 1, 2] + 1) * 2 - 0.5, rtol=1e-4, atol=1e-4)
    assert crop_grid((5, 4)) == (3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        # Places rounded to bfloat16 would be pixels away in a large image.
        torch.testing.assert_close(read_crops(maps, boxes, (2, 3)), exact)


@pytest.mark.parametrize("table", [TABLE, CROPS])
def test_a_small_step_against_the_gradient_predicts_better(table):
    model, objective = objective_of(dense_recipe("clip", table))
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


def run_recipe(table: dict[str, Any] = TABLE, **changes: Any) -> Recipe:
    changed: dict[str, Any] = copy.deepcopy(TINY_RECIPE) | {"dense": table | {"decay": 0.8}} | changes
    # Three patches a side are the fewest for crops.
    changed["stages"][0] |= {"micro_batches": 2, "resolution": 24}
    changed["optimizer"] = {"ema": 0.9}
    return parse_recipe(changed, "tiny")


@pytest.mark.parametrize("table", [pytest.param(TABLE, marks=pytest.mark.slow), CROPS])
def test_a_run_resumes_exactly(table, shapes_folder, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Trainer(run_recipe(table), shapes_folder, whole).run()
    first = Trainer(run_recipe(table), shapes_folder, stopped)
    first.stop.wanted = True
    with pytest.raises(Interrupted):
        first.run()
    Trainer(run_recipe(table), shapes_folder, stopped).run()
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(name.startswith(PREDICTOR) for name in a)
    train = [line for line in read_json_lines(whole / "metrics.jsonl") if line["kind"] == "train"]
    assert all(0 < line["dense"] < 2 for line in train)
    assert len({line["resolution"] for line in train}) > 1, "stages of several resolutions"
    assert load_recipe(whole / "recipe.toml").dense == run_recipe(table).dense


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
        ("genlip", {}, "GenLIP's last block computes no patches"),
        ("genlip", {"dense": None, "loss": {"kind": "sigmoid"}}, "a model of kind genlip contrasts nothing"),
        ("clip", {"teacher": [{"source": "x"}]}, "teachers take the same place"),
        ("clip", {"warm_start": {"frozen": ["vision"]}}, "dense trains the vision tower"),
        ("clip", {"parallel": {"mode": "fsdp"}}, 'use parallel.mode = "ddp"'),
        ("clip", {"dense": {"weight": 0}}, "dense.weight"),
        ("clip", {"dense": {"mask": 1.0}}, "dense.mask"),
        ("clip", {"stages": [STAGE | {"resolution": 8}]}, 'has 1 patch, and kind = "masked" needs 2'),
        ("clip", {"stages": [STAGE | {"resolution": 16}], "dense": CROPS}, 'has 2 patches, and kind = "crops" needs 3'),
        ("clip", {"dense": CROPS | {"mask": 0.4}}, 'mask is of kind = "masked"'),
        ("clip", {"dense": TABLE | {"crop_area": [0.3, 0.5]}}, 'crop_area is of kind = "crops"'),
        ("clip", {"dense": CROPS | {"crop_area": [0.5, 0.3]}}, "lower bound above its upper one"),
        ("clip", {"dense": CROPS | {"crop_area": [0.0, 0.3]}}, "dense.crop_area"),
        ("clip", {"dense": {"masks": 0.5}}, r"unknown key dense.masks \(did you mean mask"),
    ],
)
def test_what_does_not_go_together_is_named(kind, change, message):
    with pytest.raises(OpenVisionError, match=message):
        parse_recipe(recipe_of(kind).model_dump() | {"dense": TABLE} | change, "bad")

"""Stages of native shapes: mixed shapes in one batch, exactly; squares as they were; bad stages refused."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.demo.checkpoint import load_demo
from openvision.errors import OpenVisionError
from openvision.files import read_json_lines
from openvision.images.native import NativeShapes, pack, unpack
from openvision.inference.embed import EmbedResult
from openvision.models.openvision2 import build_model
from openvision.recipe.schema import parse_recipe
from openvision.text.tokenizer import Tokenizer
from openvision.training.checkpoint.export import export_checkpoint
from openvision.training.objective import Embeds, Terms, build_objective, weighted_losses
from openvision.training.setup.parallel import DistributedModel
from openvision.training.step import forward_backward
from openvision.training.trainer import Interrupted, Trainer
from tests.conftest import TINY_RECIPE
from tests.images.test_native import encoded
from tests.training.small_step import batch_of, randomness_of, recipe_of

NATIVE = NativeShapes(patch_size=8, max_tokens=16)
SIZES = [(32, 32), (16, 64), (64, 16), (32, 32), (16, 64), (24, 40), (32, 32), (64, 16)]


def mixed_batch():
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8) for size in SIZES]
    packed, shapes = pack(images, NATIVE.pixels)
    return replace(batch_of(), images=packed, shapes=shapes)


@pytest.mark.parametrize("kind", ["openvision", "openvision2", "openvision3", "genlip"])
@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_mixed_shapes_are_contrasted_together_exactly(kind, micro_batches):
    """The gradient is that of one graph over all images, each encoded by itself."""
    recipe = recipe_of(kind)
    model = build_model(recipe.model).double().train()
    objective = build_objective(DistributedModel(model), recipe.loss, bos_id=1)
    batch, drawn = mixed_batch(), randomness_of()
    tokens = batch.label_mask.sum()
    embeds: list[Embeds] = []
    sums: Terms = {}
    for row, size in enumerate(SIZES):
        rows = slice(row, row + 1)
        own = {
            name: getattr(batch, name)[rows]
            for name in ("alt_ids", "sentence_ids", "labels", "label_mask", "positions")
        }
        alone = replace(batch, **own, images=unpack(batch.images[rows], size), shapes=None, keys=batch.keys[rows])
        parts, terms = objective.forward(alone, drawn.rows(rows), tokens)
        embeds.append(parts)
        sums = {name: sums.get(name, 0) + term for name, term in terms.items()}
    coupled = objective.coupled(tuple(torch.cat(parts, dim=-2) for parts in zip(*embeds, strict=True)), batch)
    losses = weighted_losses(objective.weights, coupled | sums)
    losses.total.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = forward_backward(DistributedModel(model), objective, batch, drawn, micro_batches=micro_batches)
    torch.testing.assert_close(found.terms["loss"], losses.terms["loss"], rtol=1e-9, atol=1e-9)
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-8, atol=1e-9, msg=name)


def native_recipe(**changes):
    recipe = copy.deepcopy(TINY_RECIPE)
    for stage in recipe["stages"]:
        stage["native"] = {"max_tokens": (stage["resolution"] // 8) ** 2, "buckets": [0.25, 1.0, 4.0]}
    return parse_recipe(recipe | changes, "native")


def test_on_squares_it_is_the_square_run_bit_for_bit(tiny_run, shapes_folder, tmp_path):
    Trainer(native_recipe(), shapes_folder, tmp_path / "run").run()
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "run", tiny_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    measured, expected = (
        [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "eval"]
        for run in (tmp_path / "run", tiny_run)
    )
    assert [line["top1"] for line in measured] == [line["top1"] for line in expected]


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """Sixteen images of four aspects, one of them beyond every bucket."""
    folder = tmp_path_factory.mktemp("wide")
    for split in ("train", "validation"):
        with ShardWriter(folder / split) as writer:
            for number in range(16):
                size = [(40, 40), (30, 120), (120, 30), (60, 61)][number % 4] if number != 7 else (10, 200)
                texts = {"name": f"thing {number}", "category": "thing", "synthetic": f"This is thing {number}."}
                writer.write(f"image-{number}", encoded(*size, "PNG"), "png", f"a thing {number}", texts)
    return folder


@pytest.mark.parametrize(
    "kind", ["openvision", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("genlip", "openvision3"))]
)
def test_a_run_of_mixed_shapes_resumes_exactly(kind, wide_folder, tmp_path):
    changes = {}
    if kind != "openvision":
        small = recipe_of(kind)
        changes = {"model": small.model.to_dict(), "loss": small.loss.model_dump(exclude_none=True)}
    recipe = native_recipe(data=TINY_RECIPE["data"] | {"reject_budget": 1.0, "vocab_size": 40}, **changes)
    Trainer(recipe, wide_folder, tmp_path / "whole").run()
    first = Trainer(recipe, wide_folder, tmp_path / "stopped")
    first.stop.wanted = True
    with pytest.raises(Interrupted):
        first.run()
    Trainer(recipe, wide_folder, tmp_path / "stopped").run()
    ours, theirs = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rejects = read_json_lines(tmp_path / "whole" / "rejects.jsonl")
    assert {reject["reason"] for reject in rejects} == {"extreme_aspect"}
    assert "200 x 10 pixels is beyond the largest bucket" in rejects[0]["detail"]


def test_buckets_go_with_the_model(tmp_path, monkeypatch):
    """An image of 8 to 1 trains, is validated, and is read in its own shape afterwards."""
    for split in ("train", "validation"):
        with ShardWriter(tmp_path / split) as writer:
            for number in range(16):
                texts = {"name": f"thing {number}", "category": "thing", "synthetic": f"This is thing {number}."}
                size = (16, 128) if number % 2 else (40, 40)
                writer.write(f"image-{number}", encoded(*size, "PNG"), "png", f"a thing {number}", texts)
    content = copy.deepcopy(TINY_RECIPE)
    for stage in content["stages"]:
        stage["native"] = {"max_tokens": (stage["resolution"] // 8) ** 2, "buckets": [1.0, 8.0]}
    content["data"]["vocab_size"] = 40
    Trainer(parse_recipe(content, "native"), tmp_path, tmp_path / "run").run()
    lines = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if line["kind"] == "eval"]
    assert [line["rejected"] for line in lines] == [0] * len(lines)
    model = tmp_path / "run/model"
    assert json.loads((model / "config.json").read_text())["vision"]["aspects"] == [1.0, 8.0]
    assert 'openvision.load("FOLDER", preprocessing="native")' in (model / "README.md").read_text()
    export_checkpoint(tmp_path / "run", "newest", tmp_path / "exported")
    assert (tmp_path / "exported/config.json").read_bytes() == (model / "config.json").read_bytes()
    wide = np.zeros((16, 128, 3), dtype=np.uint8)
    assert openvision.load_vision(model, preprocessing="native").preprocess(wide).shape == (3, 8, 64)
    picture = tmp_path / "wide.png"
    picture.write_bytes(encoded(16, 128, "PNG"))
    monkeypatch.setattr("openvision.cluster.check_ray", lambda: None)
    monkeypatch.setattr("openvision.inference.encode_cluster.encode_on_ray", lambda *_, **__: EmbedResult(1))
    commands = (
        ["classify", str(picture), "--labels", "a,b"],
        ["encode", str(tmp_path), "-o", str(tmp_path / "out"), "--ray-workers", "1"],
    )
    for command in commands:
        for option, told in ((), True), (("--native",), False):
            done = CliRunner().invoke(app, [*command, "--model", str(model), *option])
            assert done.exit_code == 0, done.output
            assert ("trained on native shapes and reads squares" in done.output) is told
    # The demo reads what --native reads: 1 by 8 patches.
    one = load_demo(str(model), torch.device("cpu"), preprocessing="native")
    assert one.patch_pca(picture).shape == one.text_map(picture, "a thing").shape == (48, 384, 3)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_do_not_depend_on_processes_or_workers(wide_folder, workers):
    data = ShardDataset(wide_folder / "train")
    tokenizer = Tokenizer.train(["a thing 1 2 3 4 5 6 7 8 9 0"], 60)
    inputs = InputSpec(32, 8, 8, native=NATIVE)

    def batches(world: int, rank: int, start: int = 0, workers: int = 0):
        options = LoaderOptions(world_size=world, rank=rank, workers=workers, reject_budget=1.0)
        with Loader(data, tokenizer, inputs, batch_size=8, seed=3, start=start, options=options) as loader:
            return [next(loader) for _ in range(2)]

    whole = batches(1, 0)
    assert whole[0].shapes is not None
    assert len({tuple(shape) for shape in whole[0].shapes.tolist()}) > 1
    halves = [batches(2, rank, workers=workers) for rank in (0, 1)]
    for number in (0, 1):
        for name in ("images", "shapes", "alt_ids", "positions"):
            joined = torch.cat([getattr(half[number], name) for half in halves])
            assert torch.equal(joined, getattr(whole[number], name)), name
    assert torch.equal(batches(1, 0, start=8)[0].images, whole[1].images)


@pytest.mark.parametrize(
    ("native", "rest", "message"),
    [
        ({"max_tokens": 9}, {}, "max_tokens 9 must be the patches of a square.*resolution = 32 and max_tokens = 16"),
        ({"max_tokens": 16, "buckets": [0.5, 2.0]}, {}, "must contain 1.0, the square"),
        ({"max_tokens": 16}, {"parallel": {"mode": "fsdp"}}, 'use parallel.mode = "ddp"'),
        ({"max_tokens": 16}, {"teacher": [{"source": "x"}]}, "teachers read squares"),
    ],
)
def test_stages_that_cannot_be(native, rest, message):
    recipe = copy.deepcopy(TINY_RECIPE) | rest
    recipe["stages"][1]["native"] = native
    with pytest.raises(OpenVisionError, match=message):
        parse_recipe(recipe, "bad")


def test_a_shape_that_is_too_narrow_for_a_perceptual_distance_is_named():
    recipe = recipe_of("openvision3").model_dump(mode="json", exclude_none=True)
    recipe["stages"][0] |= {"native": {"max_tokens": 16, "buckets": [0.25, 1.0]}, "perceptual": 0.5}
    with pytest.raises(OpenVisionError, match=r"a side of 16 px of stages.0.native is too small for a perceptual"):
        parse_recipe(recipe, "narrow")


def test_samples_keep_their_randomness_when_sorted():
    """The sort keeps each sample with its own randomness."""
    from openvision.training.gradient_caching import sort_by_shape, split

    batch, drawn = sort_by_shape(mixed_batch(), randomness_of(0.5))
    micro = list(split(batch, drawn, 2))
    assert [len(rows.images) for rows, _ in micro] == [2, 1, 3, 2]
    assert all(np.array_equal(rows.positions.numpy(), own.positions) for rows, own in micro)
    assert sorted(key for rows, _ in micro for key in rows.keys) == [str(number) for number in range(8)]

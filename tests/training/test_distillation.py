"""A student learns from frozen teachers, exactly in micro-batches and after a stop; nothing of it is exported."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from openvision.errors import OpenVisionError
from openvision.files import read_json_lines
from openvision.objectives.distillation import cosine_distance, similarity_divergence
from openvision.recipe.schema import Recipe, load_recipe, parse_recipe
from openvision.runtime import SINGLE_PROCESS
from openvision.training.distillation import HEADS, TaughtBatch, distilled, load_teachers, teach
from openvision.training.objective import build_objective
from openvision.training.setup.model import build_distributed_model
from openvision.training.step import forward_backward
from openvision.training.trainer import Interrupted, Trainer
from tests.conftest import TINY_RECIPE
from tests.training.small_step import batch_of, randomness_of, recipe_of

TEACHERS = [
    {"source": "a/first", "library": "untrained", "patches": 0.5, "similarity": 2.0},
    {"source": "second", "library": "untrained", "pooled": 0, "patches": 1.0, "resolution": 28},
]


def taught_recipe(recipe: Recipe) -> Recipe:
    return parse_recipe(recipe.model_dump() | {"teacher": TEACHERS}, "test")


def step(recipe: Recipe, micro_batches: int, double: bool = True):
    taught = load_teachers(recipe.teacher or ())
    model = build_distributed_model(recipe.model, recipe.run, recipe.parallel, SINGLE_PROCESS, 0, taught=taught)
    if double:
        model.module.double()
    objective = distilled(build_objective(model, recipe.loss, bos_id=1), model, taught)
    dtype = torch.float32
    losses = forward_backward(model, objective, batch_of(), randomness_of(0.3), dtype, micro_batches)
    return losses.terms, {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_equal_the_batch(micro_batches):
    recipe = taught_recipe(recipe_of("openvision"))
    terms, gradients = step(recipe, 1)
    cached_terms, cached_gradients = step(recipe, micro_batches)
    assert (
        {"first_pooled", "first_patches", "first_similarity", "second_patches"} <= terms.keys() == cached_terms.keys()
    )
    for name, value in terms.items():
        torch.testing.assert_close(cached_terms[name], value, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == cached_gradients.keys()
    assert {name for name in gradients if name.startswith(HEADS)} == {
        f"{HEADS}.pooled.0.{kind}" for kind in ("weight", "bias")
    } | {f"{HEADS}.patches.{n}.{layer}.{kind}" for n in (0, 1) for layer in (0, 1) for kind in ("weight", "bias")}
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


def test_weights_enter_the_total_and_the_student_starts_as_without_teachers():
    plain = recipe_of("openvision")
    recipe = taught_recipe(plain)
    terms, _ = step(recipe, 1, double=False)
    alone, _ = step(plain, 1, double=False)
    for name, value in alone.items():
        if name != "loss":
            assert torch.equal(terms[name], value), name
    added = (
        terms["first_pooled"] + 0.5 * terms["first_patches"] + 2 * terms["first_similarity"] + terms["second_patches"]
    )
    torch.testing.assert_close(terms["loss"], alone["loss"] + added)


def test_patches_are_resampled_to_the_students_grid():
    taught = load_teachers(parse_recipe(recipe_of("clip").model_dump() | {"teacher": TEACHERS}, "test").teacher or ())
    batch = teach(batch_of(), taught, patch_size=8, chunks=4, precision=torch.float32)
    assert isinstance(batch, TaughtBatch)
    assert [tokens.shape for tokens in batch.patches] == [(8, 16, 64), (8, 16, 64)]
    assert [vectors.shape for vectors in batch.vectors] == [(8, 48), (8, 48)]
    teacher = taught[0].teacher
    assert teacher is not None
    whole = teacher(batch.images).patches
    assert whole is not None
    assert whole.shape[-2:] == (4, 4), "56 px in patches of 14: the student's grid already"
    torch.testing.assert_close(batch.patches[0], whole.flatten(2).transpose(1, 2))


def test_losses():
    torch.manual_seed(0)
    student, teacher = F.normalize(torch.randn(5, 7), dim=1), F.normalize(torch.randn(5, 4), dim=1)
    share = torch.full((5,), 0.2)
    assert cosine_distance(student, 3 * student, share).abs() < 1e-6
    assert (cosine_distance(student, -student, share) - 2).abs() < 1e-6
    assert similarity_divergence(teacher, teacher, 0.1).abs() < 1e-6
    expected = torch.zeros(())
    for row in range(5):
        others = [column for column in range(5) if column != row]
        p = torch.softmax(teacher[row] @ teacher[others].T / 0.3, dim=0)
        q = torch.softmax(student[row] @ student[others].T / 0.3, dim=0)
        expected += (p * (p / q).log()).sum() / 5
    torch.testing.assert_close(similarity_divergence(student, teacher, 0.3), expected)


def run_recipe() -> Recipe:
    changed = copy.deepcopy(TINY_RECIPE) | {"teacher": TEACHERS}
    changed["stages"][0]["micro_batches"] = 2
    changed["optimizer"] = {"ema": 0.9}
    return parse_recipe(changed, "tiny")


def test_a_run_learns_from_its_teachers_and_resumes_exactly(shapes_folder, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Trainer(run_recipe(), shapes_folder, whole).run()
    first = Trainer(run_recipe(), shapes_folder, stopped)
    first.stop.wanted = True
    with pytest.raises(Interrupted):
        first.run()
    Trainer(run_recipe(), shapes_folder, stopped).run()
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(name.startswith(HEADS) for name in a)
    train = [line for line in read_json_lines(whole / "metrics.jsonl") if line["kind"] == "train"]
    assert train[-1]["first_pooled"] < train[0]["first_pooled"]
    assert train[-1]["first_patches"] < train[0]["first_patches"]
    assert load_recipe(whole / "recipe.toml").teacher == run_recipe().teacher
    assert "teacher a/first: 0.1M frozen parameters" in (whole / "sessions.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": [{"source": "x", "pooled": 0}]}, "teacher.0: .*teaches nothing; leave the table out"),
        ({"teacher": [{"source": "a/x"}, {"source": "b/x"}]}, "two teachers named 'x'; give each its own name"),
        ({"teacher": [{"source": "x", "libary": "timm"}]}, r"unknown key teacher.0.libary \(did you mean library"),
    ],
)
def test_bad_tables(change, message):
    with pytest.raises(OpenVisionError, match=message):
        parse_recipe(copy.deepcopy(TINY_RECIPE) | change, "bad")


def test_a_model_without_text_tower_takes_no_teacher():
    with pytest.raises(OpenVisionError, match="a model without a text tower trains no pooled vector"):
        taught_recipe(recipe_of("openvision2"))


def test_a_missing_teacher_is_named(shapes_folder, tmp_path, tiny_recipe):
    recipe = parse_recipe(
        tiny_recipe.model_dump() | {"teacher": [{"source": "no/such/folder", "library": "timm"}]}, "t"
    )
    with pytest.raises(OpenVisionError, match="teacher no/such/folder is not a folder"):
        Trainer(recipe, shapes_folder, tmp_path / "run")


def test_openvision_3_takes_no_teachers():
    path = next((Path(__file__).parents[2] / "recipes/openvision3").glob("*.toml"))
    with pytest.raises(OpenVisionError, match="OpenVision 3 takes none"):
        load_recipe(path, ["teacher=[{source = 'x'}]"])

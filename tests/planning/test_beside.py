"""Teachers and the dense objective in a plan: operations against torch's counter, memory against autograd."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from openvision.hardware import DEVICES
from openvision.models.variants import variant
from openvision.models.vision import VisionTransformer
from openvision.objectives.distillation import cosine_distance
from openvision.planning.beside import Additions
from openvision.planning.memory import NOTHING, Setting, peak_bytes, state_bytes
from openvision.planning.numbers import plan_numbers
from openvision.planning.parameters import count_parameters
from openvision.planning.plan import Plan, make_plan
from openvision.planning.stage import Assumptions
from openvision.recipe.schema import load_recipe
from openvision.recipe.sections import Dense, TeacherTable
from openvision.runtime import SINGLE_PROCESS
from openvision.teachers.load import load_teacher
from openvision.teachers.shape import TeacherShape, teacher_shape
from openvision.teachers.teacher import Preprocessing, Teacher
from openvision.training.dense import DenseObjective, DensePredictor
from openvision.training.distillation import DistilledObjective, Taught, TaughtBatch, TeacherHeads
from openvision.training.objective import build_objective
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.model import build_distributed_model
from tests.planning.conftest import count
from tests.planning.test_memory import bytes_kept
from tests.training.small_step import batch_of, recipe_of

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = variant("tiny", 16, 160)
SHAPE = TeacherShape(forward=123, parameters=456, pooled_width=768, patch_map=(1024, 16, 16), largest=257 * 4096)
BOTH = TeacherTable(source="a/big", patches=1.0)


def plan(name: str, **overrides: object) -> Plan:
    recipe = load_recipe(RECIPES / name, [f"{key}={value}" for key, value in overrides.items()])
    device = DEVICES["h100"]
    return make_plan(recipe, Assumptions(device, 8, device.mfu, device.price))


def dense_objective(tower: VisionTransformer, table: Dense) -> DenseObjective:
    predictor = DensePredictor(tower.config, table.kind)
    recipe = recipe_of("clip")
    model = build_distributed_model(recipe.model, recipe.run, recipe.parallel, SINGLE_PROCESS, 0)
    return DenseObjective(build_objective(model, recipe.loss, 1), tower, predictor, table)


DENSE = [Dense(), Dense(kind="crops")]


@pytest.mark.parametrize("table", DENSE, ids=lambda table: table.kind)
def test_operations_of_the_dense_objective(table, meta):
    tower = VisionTransformer(TINY.vision, 192)
    with torch.device("cpu"):
        objective = dense_objective(tower, table)
    objective.predictor.to("meta")
    images = torch.empty(2, 3, 160, 160)
    randomness = SampleRandomness(0, np.arange(2), 0.0)
    counted = count(lambda: objective._distance(images, randomness).backward())
    assert counted == 2 * sum(part.training for part in Additions(TINY, (), table).flops(160))


@pytest.mark.parametrize("table", DENSE, ids=lambda table: table.kind)
@pytest.mark.parametrize("bf16", [False, True])
def test_memory_of_the_dense_objective_within_a_tenth(bf16, table):
    tower = VisionTransformer(TINY.vision, 192)
    tower.init_weights()
    objective = dense_objective(tower, table)
    objective.predictor.init_weights()
    images = torch.randint(0, 256, (3, 3, 160, 160), dtype=torch.uint8)
    modules = nn.ModuleList([tower, objective.predictor])
    kept = bytes_kept(modules, lambda: objective._distance(images, SampleRandomness(0, np.arange(3), 0.0)), bf16)
    beside = Additions(TINY, (), table).memory(160, 2, Setting(bf16=bf16, gpu=False))
    assert kept / 3 == pytest.approx(beside.kept[1], rel=0.1)


def taught() -> Taught:
    return Taught(None, BOTH, SHAPE.pooled_width, 1024, "")


def projected(heads: TeacherHeads, tokens: torch.Tensor, targets: torch.Tensor):
    """The distances to a teacher, as the objective computes them."""
    recipe = recipe_of("openvision")
    model = build_distributed_model(recipe.model, recipe.run, recipe.parallel, SINGLE_PROCESS, 0)
    inner = build_objective(model, recipe.loss, 1)
    output = inner.output(batch_of())  # pyright: ignore[reportAttributeAccessIssue]
    vision = replace(output.vision, patch_tokens=tokens, pooled=tokens.mean(dim=1))
    share = torch.full((len(tokens),), 1 / len(tokens), device=tokens.device)
    fields = {**vars(batch_of()), "vectors": (targets[:, 0, :768],), "patches": (targets,), "share": share}
    batch = TaughtBatch(**fields)
    objective = DistilledObjective(inner, heads, (taught(),))  # pyright: ignore[reportArgumentType]
    return sum(objective._distances(replace(output, vision=vision), batch).values())


def test_operations_of_the_projections(meta):
    heads = TeacherHeads(TINY.vision.width, [taught()])
    tokens = torch.empty(2, 100, TINY.vision.width, requires_grad=True)
    targets = torch.empty(2, 100, 1024)
    with torch.device("cpu"):
        counted = count(lambda: projected(heads, tokens, targets).backward())  # pyright: ignore[reportAttributeAccessIssue]
        student = count(lambda: projected(heads, tokens.detach(), targets)) - 2 * heads_flops().forward
    assert counted - student == 2 * heads_flops().training


def heads_flops():
    _, heads = Additions(TINY, ((BOTH, SHAPE),)).flops(160)
    return heads


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_of_the_projections_within_a_tenth(bf16):
    heads = TeacherHeads(TINY.vision.width, [taught()])
    dtype = torch.bfloat16 if bf16 else torch.float32
    tokens = torch.randn(3, 100, TINY.vision.width, requires_grad=True).to(dtype)
    targets = torch.randn(3, 100, 1024).to(dtype)
    patches, norm = heads.patches[0], torch.full((3,), 1 / 3)
    kept = bytes_kept(heads, lambda: cosine_distance(patches(tokens), targets, norm), bf16)
    beside = Additions(TINY, ((BOTH, SHAPE),)).memory(160, 2, Setting(bf16=bf16, gpu=False))
    # The target of float32 is the batch's own.
    kept -= 0 if bf16 else targets.untyped_storage().nbytes()
    assert kept / 3 == pytest.approx(beside.kept[1], rel=0.1)
    assert beside.batch == 4 * 768 + (2 if bf16 else 4) * 100 * 1024


def test_parameters_are_those_that_a_run_makes():
    width = TINY.vision.width
    heads = Additions(TINY, ((BOTH, SHAPE),))
    assert sum(heads.trained().values()) == sum(p.numel() for p in TeacherHeads(width, [taught()]).parameters())
    assert heads.frozen() == {"teacher big": 456}
    dense = Additions(TINY, (), Dense())
    predictor = DensePredictor(TINY.vision)
    assert sum(dense.trained().values()) == sum(p.numel() for p in predictor.parameters() if p.requires_grad)
    assert sum(dense.frozen().values()) == sum(p.numel() for p in predictor.averaged.parameters())
    parameters = count_parameters(TINY, dense.trained(), dense.frozen())
    alone = state_bytes(count_parameters(TINY), Setting(bf16=False))
    added = 14 * sum(dense.trained().values()) + 4 * sum(dense.frozen().values())
    assert sum(state_bytes(parameters, Setting(bf16=False)).values()) == sum(alone.values()) + added


def test_a_teacher_with_a_cache_computes_nothing_and_its_rows_are_kept():
    cached = BOTH.model_copy(update={"cache": "features"})
    additions = Additions(TINY, ((cached, SHAPE),))
    assert additions.frozen() == {}
    assert [part.name for part in additions.flops(160)] == ["teacher big, projections"]
    here, there = (Additions(TINY, ((one, SHAPE),)).memory(160, 2, Setting()) for one in (BOTH, cached))
    assert there.batch - here.batch == 4 * (768 + 1024 * 256)
    assert here.before[1] > there.before[1] == 0
    assert here.kept == there.kept


def test_released_teachers_are_known_without_their_weights(meta):
    known = teacher_shape("openvision-vit-large-patch14-224")
    config = variant("large", 14, 224)
    tower = VisionTransformer(config.vision, config.embed_dim)
    assert known.forward == count(tower, torch.empty(1, 3, 224, 224))
    assert known.parameters == sum(parameter.numel() for parameter in tower.parameters())
    assert known.pooled_width == config.embed_dim
    assert known.patch_map == (1024, 16, 16)


def test_other_teachers_are_loaded_and_counted(monkeypatch):
    own = teacher_shape("any", "untrained")
    teacher = load_teacher("any", "untrained")
    assert (own.pooled_width, own.patch_map) == (teacher.pooled_width, teacher.patch_map)
    network = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.GELU())

    def read(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spatial = network(images)
        return spatial.mean(dim=(2, 3)), spatial

    middle = (0.5, 0.5, 0.5)
    foreign = Teacher("conv", network, read, Preprocessing(32, middle, middle, "bilinear"))
    monkeypatch.setattr("openvision.teachers.shape.load_teacher", lambda *_: foreign)
    counted = teacher_shape("conv", "timm")
    assert counted.forward == 2 * 5 * 3 * 16 * 64
    assert counted.parameters == 5 * 48 + 5
    assert counted.patch_map == (5, 8, 8)
    assert counted.largest == 5 * 64


def test_the_plan_of_a_recipe_with_a_teacher():
    plain = plan("distill/ti16.toml", teacher="[]")
    made = plan("distill/ti16.toml")
    known = teacher_shape("openvision-vit-large-patch14-224")
    for before, after in zip(plain.stages, made.stages, strict=True):
        parts = {part.name: part for part in after.towers}
        assert parts["teacher l14"].training == known.forward
        added = after.training - before.training
        assert added == known.forward + parts["teacher l14, projections"].training
        assert after.fits[0].peak[0] > before.fits[0].peak[0] or after.fits[0].micro_batch < before.fits[0].micro_batch
    assert made.parameters.frozen == {"teacher l14": known.parameters}
    written = plan_numbers(made)
    assert written["stages"][0]["layouts"][0]["state_bytes"]["frozen"] == 4 * known.parameters
    # One more forward pass of a teacher that is 60 times the student costs hours.
    assert made.cost.hours[0] > 1.5 * plain.cost.hours[0]
    assert math.isclose(
        plan("distill/ti16.toml", augment="{views = 4}", **{"teacher.0.cache": '"c"'}).flops,
        made.flops - known.forward * made.samples,
        rel_tol=1e-9,
    )


def test_the_plan_of_a_recipe_with_a_dense_objective():
    made, masked = (plan("beyond/dense-b16.toml", **change) for change in ({}, {"dense": '{kind = "masked"}'}))
    for one, again in ((made, "crops"), (masked, "masked pass")):
        names = [part.name for part in one.stages[0].towers]
        assert names[-3:] == [again, "dense head", "averaged tower"]
    assert made.flops < masked.flops
    assert {fit.setting.sharding for fit in made.stages[0].fits} == {"replicated"}
    parameters = made.parameters
    assert set(parameters.frozen) == {"averaged tower"}


def test_nothing_is_added_without_the_tables():
    additions = Additions(TINY)
    assert additions.flops(160) == ()
    assert additions.trained() == additions.frozen() == {}
    assert additions.memory(160, 2, Setting()) == NOTHING


def test_what_is_worked_with_before_the_model_counts_where_it_is_the_peak():
    parameters = count_parameters(TINY)
    huge = replace(SHAPE, largest=10**9)
    low, high = (
        peak_bytes(
            TINY, parameters, 160, 2, Setting(), 8, 64, Additions(TINY, ((BOTH, shape),)).memory(160, 2, Setting())
        )
        for shape in (SHAPE, huge)
    )
    assert high[0] - low[0] > 8 * 2 * 10**9
    assert high[1] > 8 * 4 * 4 * 10**9

"""Out of memory is one sentence with the setting that the planner expects to fit."""

import torch

from openvision.hardware import GIB
from openvision.planning.remedy import MemoryPlan
from openvision.recipe.schema import load_recipe
from tests.test_runtime import RECIPE

L14 = RECIPE.parent / "openvision" / "l14.toml"


def plan(memory: float, *overrides: str, devices: int = 8) -> MemoryPlan:
    recipe = load_recipe(L14, ["stages.1.micro_batches=1", *overrides])
    return MemoryPlan(recipe, 1, devices, True, torch.bfloat16, memory * GIB)


def test_the_batch_is_named():
    recipe = load_recipe(L14)
    stage = recipe.stages[1]
    each = stage.batch_size // 8
    expected = f"stage 2, a batch of {stage.batch_size} ({each} on each of 8 devices) at {stage.resolution} px"
    assert plan(80).batch() == expected
    assert plan(80, "stages.1.micro_batches=4").batch() == f"{expected} in 4 micro-batches"


def test_the_number_of_micro_batches_that_fit_is_the_planners():
    roomy, narrow = (plan(memory).micro_batches("none") for memory in (140, 40))
    assert roomy is not None
    assert narrow is not None
    assert 1 < roomy < narrow
    assert plan(40).remedy() == (
        f"--set stages.1.micro_batches={narrow} fits by the planner's estimate: the same command resumes the run with "
        "it"
    )


def test_where_the_planner_was_wrong_the_next_divisor_is_named():
    fitting = plan(80).micro_batches("none")
    assert fitting is not None
    remedy = plan(80, f"stages.1.micro_batches={fitting}").remedy()
    assert f"the planner expected {fitting} micro-batches to fit" in remedy
    assert f"stages.1.micro_batches={2 * fitting};" in remedy


def test_where_one_sample_does_not_fit_checkpointing_or_more_devices_are_named():
    huge = "stages.1.resolution=3360"
    assert plan(30, huge, "stages.1.batch_size=32").micro_batches("none") is None
    assert "run.activation_checkpointing=" in plan(30, huge, "stages.1.batch_size=32").remedy()
    assert "parallel.mode=fsdp" in plan(2).remedy()

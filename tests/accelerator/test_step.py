"""The trainer's step on a pretended accelerator: no tensor on the wrong device, no wait, only the copies listed."""

import pkgutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from openvision.recipe.schema import Recipe, parse_recipe
from openvision.training.guards import DeferredGuard
from openvision.training.objective import build_objective
from openvision.training.optimizer import build_optimizer
from openvision.training.run.log import NoLog
from openvision.training.run.signals import StopRequest
from openvision.training.run.throughput import Meter
from openvision.training.run.watchdog import Watchdog
from openvision.training.setup.data import DeviceBatches, open_loader
from openvision.training.setup.parallel import DistributedModel
from openvision.training.setup.parts import set_up_run
from openvision.training.step import Step
from tests.accelerator.fake import fake_accelerator

TOWER = {"width": 32, "depth": 2, "mlp_dim": 48, "heads": 2}
DECODER = {**TOWER, "vocab_size": 400, "caption_length": 24}
VISION = {**TOWER, "patch_size": 8, "image_size": 32}
CLIP = {"embed_dim": 16, "vision": VISION, "text": {**TOWER, "vocab_size": 400, "context_length": 16}}
MODELS = {
    "openvision": ({**CLIP, "decoder": DECODER}, {}),
    "clip": (CLIP, {"caption": 0, "texts": ["alt"]}),
    "openvision2": ({"kind": "openvision2", "vision": VISION, "decoder": DECODER}, {"contrastive": 0, "texts": []}),
}
# Copies to the device in a steady step are all made by `runtime.send`. Of a batch: images, ids of both texts, labels.
# Of a micro-batch: places of the caption's targets and what each counts, patches to read, scales of dropped branches
# (twice with gradient caching).
OF_A_BATCH, OF_A_MICRO_BATCH = 4, 5


def recipe_of(kind: str, micro_batches: int, precision: str) -> Recipe:
    model, loss = MODELS[kind]
    stage = {"resolution": 32, "samples": 320, "batch_size": 8, "base_learning_rate": 0.01, "drop_path": 0.2}
    table = {
        "name": kind,
        "model": model,
        "loss": loss,
        "data": {"train": "train", "vocab_size": 400},
        "optimizer": {"clip_norm": 1.0, "ema": 0.9},
        "guards": {"spikes": "skip"},
        "stages": [{**stage, "micro_batches": micro_batches}],
        "run": {"precision": precision, "log_every": 1000, "activation_checkpointing": "selective"},
    }
    return parse_recipe(table, kind)


def steady_step(recipe: Recipe, data, folder) -> tuple[Counter[str], Counter[str]]:
    """Copies to the device and to the host in the fourth step, which is like all that follow."""
    parts = set_up_run(recipe, data, folder)
    stage = recipe.stages[0]
    loader = open_loader(recipe, stage, parts.dataset, parts.tokenizer, parts.processes, 0, folder)
    with loader, fake_accelerator() as accelerator:
        batches = DeviceBatches(iter(loader), accelerator.device)
        accelerator.place(parts.model.module)
        model = DistributedModel(parts.model.module, replace(parts.processes, device=accelerator.device))
        optimizer = build_optimizer(model.module, recipe.optimizer)
        objective = build_objective(model, recipe.loss, parts.tokenizer.bos_id)
        parts = replace(parts, model=model, optimizer=optimizer, objective=objective, processes=model.processes)
        guard = DeferredGuard(recipe.guards, parts.progress, model.processes)
        watchdog = Watchdog(folder, 0, recipe.run.hang_seconds, print)
        step = Step(parts, stage, batches, Meter(accelerator.device, None), NoLog(), watchdog, StopRequest(), guard)
        for _ in range(4):
            accelerator.forget()
            step()
        assert {parameter.device for parameter in model.module.parameters()} == {accelerator.device}
        return Counter(accelerator.to_device), Counter(accelerator.to_host)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_a_steady_step_waits_for_nothing(kind, micro_batches, precision, shapes_folder, tmp_path):
    sent, received = steady_step(recipe_of(kind, micro_batches, precision), shapes_folder, tmp_path)
    assert {place.split(":")[0] for place in sent} == {"runtime.py"}, sent
    # What the guard found, once a step.
    assert received == {next(iter(received)): 1}, received
    assert next(iter(received)).startswith("runtime.py:")
    assert sent.total() <= OF_A_BATCH + OF_A_MICRO_BATCH * micro_batches


@pytest.mark.parametrize(
    ("place", "wait"),
    [
        ("openvision.training.step.gradient_norm", lambda norm: norm.new_full((), norm.item())),
        ("openvision.training.objective.caption_loss", lambda loss: loss if loss > 0 else -loss),
        ("openvision.training.guards.DeferredGuard.select", lambda selected: selected.nonzero().any()),
        ("openvision.training.step.training_flops", lambda flops: flops * len(torch.ones(2).tolist())),
    ],
    ids=["step", "loss", "guard", "log"],
)
def test_a_wait_that_is_put_in_is_found(place, wait, shapes_folder, tmp_path, monkeypatch):
    owner, name = place.rsplit(".", 1)
    original = getattr(pkgutil.resolve_name(owner), name)
    monkeypatch.setattr(place, lambda *arguments, **options: wait(original(*arguments, **options)))
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        steady_step(recipe_of("openvision", 1, "float32"), shapes_folder, tmp_path)

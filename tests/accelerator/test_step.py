"""The trainer's step on a pretended accelerator: no tensor on the wrong device, no wait, only the copies listed."""

import pkgutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from openvision.models.decoders.parallel import DecoderConfig
from openvision.models.openvision2 import OpenVision2Config, build_model
from openvision.models.openvision3 import OpenVision3Config
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.text.tokenizer import Tokenizer
from openvision.training.dense import with_dense
from openvision.training.distillation import DistilledObjective, distilled
from openvision.training.guards import DeferredGuard
from openvision.training.objective import build_objective
from openvision.training.optimizer.build import build_optimizer
from openvision.training.run.log import NoLog, RunLog
from openvision.training.run.signals import StopRequest
from openvision.training.run.throughput import Meter
from openvision.training.run.watchdog import Watchdog
from openvision.training.setup.data import DeviceBatches, open_loader
from openvision.training.setup.parallel import DistributedModel
from openvision.training.setup.parts import set_up_run
from openvision.training.step import Step
from openvision.weights.folder import save_folder
from tests.accelerator.fake import fake_accelerator
from tests.accelerator.models import MODELS

WAITS = (DataDependentOutputException, DynamicOutputShapeException)
TEACHER = {"source": "t", "library": "untrained", "resolution": 28, "pooled": 1.0, "patches": 1.0, "similarity": 1.0}
# What the recipe of a variant changes. The first has everything on.
VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "plain": {"optimizer": {}, "guards": {}, "run": {}, "stage": {"drop_path": 0.0}},
    "spikes logged": {"guards": {"spikes": "log"}},
    "muon": {"optimizer": {"clip_norm": 1.0, "ema": 0.9, "kind": "muon"}},
    "full checkpointing": {"run": {"activation_checkpointing": "full"}},
    "dense": {"table": {"dense": {}}},
    "dense crops": {"table": {"dense": {"kind": "crops"}}},
    "teacher": {"table": {"teacher": [TEACHER]}},
    "frozen": {"table": {"start": "made by the test", "warm_start": {"frozen": ["vision"]}}},
    "registers and attention pooling": {"vision": {"registers": 2, "pool": "map"}},
    "native": {"stage": {"native": {"max_tokens": 16, "buckets": [0.5, 1.0, 2.0]}, "drop_path": 0.0}},
    "native, dropped branches": {
        "stage": {"native": {"max_tokens": 16, "buckets": [0.5, 1.0, 2.0]}, "drop_path": 0.2},
    },
    # Captions under stochastic depth are not grouped in one transformer.
    "trimmed": {"run": {"trim_texts": True}, "stage": {"drop_path": 0.0}, "masked": True},
    "float32 moments": {"optimizer": {"clip_norm": 1.0, "ema": 0.9, "first_moment": "float32"}},
}


# Others cover most of what these do: the last three stand beside plain CLIP in two micro-batches, or beside each other.
SELDOM = (
    *("float32 moments", "full checkpointing", "spikes logged", "native, dropped branches"),
    *("dense", "dense crops", "teacher"),
)


SHAPES = 3
"""Shapes in each batch of `mixed_folder`."""


def start_of(recipe: Recipe, folder: Path) -> str:
    """A model folder that the recipe can start from."""
    save_folder(folder, build_model(recipe.model), Tokenizer.train(["a red square on white"], 400), "", {})
    return str(folder)


def recipe_of(kind: str, micro_batches: int = 1, precision: str = "float32", variant: str = "everything") -> Recipe:
    model, loss = MODELS[kind]
    change = VARIANTS[variant]
    model = {**model, "vision": {**model["vision"], **change.get("vision", {})}}
    if change.get("run", {}).get("trim_texts") and "text" in model:
        model = {**model, "text": {**model["text"], "pad_id": 0, "pool": "mean"}}
    if change.get("masked") and kind == "openvision":
        model = {**model, "decoder": {**model["decoder"], "reads_padding": False}}
    stage = {"resolution": 32, "samples": 320, "batch_size": 8, "base_learning_rate": 0.01}
    table = {
        "name": kind,
        "model": model,
        "loss": loss,
        "data": {"train": "train", "vocab_size": 400},
        "optimizer": change.get("optimizer", {"clip_norm": 1.0, "ema": 0.9}),
        "guards": change.get("guards", {"spikes": "skip"}),
        **change.get("table", {}),
        "stages": [{**stage, "micro_batches": micro_batches, **change.get("stage", {"drop_path": 0.2})}],
        "run": {
            "precision": precision,
            "log_every": 1000,
            **change.get("run", {"activation_checkpointing": "selective"}),
        },
    }
    return parse_recipe(table, kind)


def steady_step(recipe: Recipe, data: Path, folder: Path, losses: int = 0) -> tuple[Counter[str], Counter[str]]:
    """Copies to the device and to the host in the second step, which is like all that follow.

    `losses` is the number of losses that the guard of spikes has already seen.
    """
    parts = set_up_run(recipe, data, folder)
    parts.progress.recent_losses = [1.0] * losses
    stage = recipe.stages[0]
    loader = open_loader(recipe, stage, parts.dataset, parts.tokenizer, parts.processes, 0, folder, parts.features)
    with ExitStack() as stack:
        stack.enter_context(loader)
        log = NoLog() if recipe.run.log_every > 1 else stack.enter_context(RunLog(recipe, folder, 0))
        accelerator = stack.enter_context(fake_accelerator())
        batches = DeviceBatches(iter(loader), accelerator.device)
        accelerator.place(parts.model.module)
        model = DistributedModel(parts.model.module, replace(parts.processes, device=accelerator.device))
        optimizer = build_optimizer(model.module, recipe.optimizer)
        objective = build_objective(model, recipe.loss, parts.tokenizer.bos_id)
        if isinstance(parts.objective, DistilledObjective):
            for one in parts.objective.taught:
                if one.teacher is not None:
                    accelerator.place(one.teacher.module)
            objective = distilled(objective, model, parts.objective.taught)
        objective = with_dense(objective, model, recipe.dense)
        parts = replace(parts, model=model, optimizer=optimizer, objective=objective, processes=model.processes)
        guard = DeferredGuard(recipe.guards, parts.progress, model.processes)
        # It learns of the first step in the second.
        guard.LAG = 0
        watchdog = Watchdog(folder, 0, recipe.run.hang_seconds, print)
        step = Step(parts, stage, batches, Meter(accelerator.device, None), log, watchdog, StopRequest(), guard)
        for _ in range(2):
            accelerator.forget()
            step()
        assert {parameter.device for parameter in model.module.parameters()} == {accelerator.device}
        return Counter(accelerator.to_device), Counter(accelerator.to_host)


def expected_copies(recipe: Recipe) -> Counter[str]:
    """Every copy to the device in a step; all are made by `runtime.send`."""
    (stage,), model = recipe.stages, recipe.model
    micro, forwards = stage.micro_batches, 1 if stage.micro_batches == 1 else 2
    if stage.native is not None:
        # A micro-batch a shape, in one graph but where branches are dropped.
        micro, forwards = SHAPES, 2 if stage.micro_batches > 1 or stage.drop_path else 1
    unified = isinstance(model, OpenVision3Config)
    copies = {
        # Images, ids of both texts, labels.
        "training/setup/data.py, sent": 4,
        # Places of the caption's targets, and what each counts.
        "objectives/caption.py, sent": 2 * micro if model.decoder is not None else 0,
        # Patches to read, or the samples whose pixels are compared.
        "training/objective.py, sent": micro if isinstance(model, OpenVision2Config) or unified else 0,
        # Rows of the groups of texts that are trimmed, those that a decoder reads apart, and of captions.
        "models/decoders/lengths.py, sent": _groupings(recipe),
        # The order of images sorted by shape.
        "training/gradient_caching.py, sent": 1 if stage.native is not None else 0,
        # Patches that the student does not see.
        "training/dense.py, sent": micro if recipe.dense is not None else 0,
        # Scales of dropped branches, in every forward pass, and where the noise on tokens begins.
        "training/randomness.py, sent": (micro * forwards if stage.drop_path else 0) + (micro if unified else 0),
    }
    return +Counter(copies)


def _groupings(recipe: Recipe) -> int:
    """How often a step of one micro-batch sorts by length."""
    if not recipe.run.trim_texts:
        return 0
    captions, texts = int(recipe.model.decoder is not None), int(recipe.model.text is not None)
    masked = isinstance(recipe.model.decoder, DecoderConfig) and not recipe.model.decoder.reads_padding
    return captions + texts + masked


@pytest.mark.parametrize(
    ("kind", "micro_batches", "precision"),
    [
        *((kind, 1, "float32") for kind in MODELS),
        *((kind, 2, "bfloat16") for kind in ("openvision", "openvision2", "openvision3")),
        *(
            pytest.param(kind, 2, precision, marks=pytest.mark.slow)
            for kind in MODELS
            for precision in ("bfloat16", "float32")
            if precision == "float32" or kind in ("clip", "sigmoid", "joint", "genlip")
        ),
    ],
)
def test_a_steady_step_waits_for_nothing(kind, micro_batches, precision, shapes_folder, tmp_path):
    recipe = recipe_of(kind, micro_batches, precision)
    sent, received = steady_step(recipe, shapes_folder, tmp_path)
    assert sent == expected_copies(recipe)
    # What the guard found.
    assert received == {"training/guards.py, HostCopy": 1}


@pytest.mark.parametrize(
    ("variant", "kind", "micro_batches"),
    [
        *((name, "openvision", 1) for name in VARIANTS if name not in ("everything", *SELDOM)),
        *(pytest.param(name, "openvision", 1, marks=pytest.mark.slow) for name in SELDOM),
        ("teacher", "clip", 2),
        ("dense crops", "clip", 2),
        ("trimmed", "openvision2", 1),
        ("trimmed", "openvision3", 1),
        pytest.param("native", "openvision", 2, marks=pytest.mark.slow),
        pytest.param("dense", "openvision2", 2, marks=pytest.mark.slow),
        pytest.param("trimmed", "clip", 1, marks=pytest.mark.slow),
        pytest.param("trimmed", "genlip", 1, marks=pytest.mark.slow),
        pytest.param("native", "genlip", 1, marks=pytest.mark.slow),
        pytest.param("muon", "genlip", 1, marks=pytest.mark.slow),
        pytest.param("muon", "openvision2", 1, marks=pytest.mark.slow),
    ],
)
def test_every_option_of_a_step_waits_for_nothing(variant, kind, micro_batches, shapes_folder, mixed_folder, tmp_path):
    recipe = recipe_of(kind, micro_batches, "float32", variant)
    if recipe.frozen_towers:
        recipe = recipe.model_copy(update={"start": start_of(recipe, tmp_path / "start")})
    native = recipe.stages[0].native is not None
    # Spikes are looked for once there are enough losses to compare with.
    sent, received = steady_step(recipe, mixed_folder if native else shapes_folder, tmp_path / "run", losses=30)
    assert sent == expected_copies(recipe)
    assert received == {"training/guards.py, HostCopy": 1}


def test_a_logged_step_waits_for_its_losses_norms_and_equal_texts_only(shapes_folder, tmp_path):
    recipe = recipe_of("openvision", 2)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"log_every": 1})})
    sent, received = steady_step(recipe, shapes_folder, tmp_path)
    assert sent == expected_copies(recipe)
    assert received == {
        "training/guards.py, HostCopy": 1,
        "training/objective.py, HostCopy": 1,
        "training/step.py, HostCopy": 1,
        "training/optimizer/update.py, HostCopy": 1,
    }


@pytest.mark.parametrize(
    ("place", "wait"),
    [
        ("openvision.training.step.gradient_norm", lambda norm: norm.new_full((), norm.item())),
        ("openvision.training.objective.caption_loss", lambda loss: loss if loss > 0 else -loss),
        ("openvision.training.objective.contrastive_losses", lambda losses: losses[losses > 0].mean()[None]),
        ("openvision.training.guards.DeferredGuard.select", lambda selected: selected.nonzero().any()),
        ("openvision.training.step.Losses.finite", lambda finite: finite.new_tensor(finite.tolist())),
        ("openvision.training.optimizer.update.global_norm", lambda norm: norm.new_full((), float(norm))),
        ("openvision.training.step.apply_update", lambda norms: norms and bool(norms.update > 0)),
        ("openvision.training.step.Losses.values", lambda values: values | {"one": torch.ones(1).item()}),
    ],
    ids=["step", "caption loss", "contrastive loss", "guard", "finite", "clipping", "update", "log"],
)
def test_a_wait_that_is_put_in_is_found(place, wait, shapes_folder, tmp_path, monkeypatch):
    owner, name = place.rsplit(".", 1)
    original = getattr(pkgutil.resolve_name(owner), name)
    monkeypatch.setattr(place, lambda *arguments, **options: wait(original(*arguments, **options)))
    recipe = recipe_of("openvision")
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"log_every": 1})})
    with pytest.raises(WAITS):
        steady_step(recipe, shapes_folder, tmp_path)


@pytest.mark.parametrize(
    ("place", "copy"),
    [
        ("openvision.training.step.gradient_norm", lambda norm: norm.cpu().to(norm.device)),
        ("openvision.training.objective.caption_loss", lambda loss: loss + torch.tensor([0.0], device=loss.device)[0]),
    ],
    ids=["to the host and back", "a tensor made of a list"],
)
def test_a_copy_that_is_put_in_is_found(place, copy, shapes_folder, tmp_path, monkeypatch):
    owner, name = place.rsplit(".", 1)
    original = getattr(pkgutil.resolve_name(owner), name)
    monkeypatch.setattr(place, lambda *arguments, **options: copy(original(*arguments, **options)))
    recipe = recipe_of("openvision", variant="plain")
    sent, _ = steady_step(recipe, shapes_folder, tmp_path)
    assert sent != expected_copies(recipe)

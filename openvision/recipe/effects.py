"""Settings that would have no effect, and runs that would train nothing: refused instead of accepted in silence.

A setting may be written with its default wherever it is: recipes that run folders store have every key.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from openvision.models.genlip import GenLipConfig
from openvision.models.openvision2 import ModelConfig
from openvision.models.openvision3 import OpenVision3Config
from openvision.recipe.sections import (
    Data,
    Dense,
    Loss,
    Optimizer,
    Reconstruction,
    Run,
    Stage,
    TeacherTable,
    WarmStart,
)


class Tables(Protocol):
    """What of a recipe decides on the effect of its settings."""

    start: str | None
    warm_start: WarmStart | None
    model: ModelConfig
    data: Data
    loss: Loss
    optimizer: Optimizer
    stages: tuple[Stage, ...]
    teacher: tuple[TeacherTable, ...] | None
    dense: Dense | None
    run: Run

    @property
    def frozen_towers(self) -> tuple[str, ...]:
        """Towers of which only the projection into the shared space is trained."""
        ...


@dataclass(frozen=True)
class _Setting:
    """A key of a recipe, and when it does nothing."""

    key: str
    """Dotted and without the numbers of tables in an array."""
    idle: Callable[[Tables, Any], str | None]
    """Why it has no effect in this recipe and this table, and what to do; None where it has one."""
    off: tuple[object, ...] = ()
    """Values beside the default that ask for nothing."""


def require_effects(recipe: Tables) -> None:
    """Raise ValueError that names the key for a setting without effect, and for a run that would train nothing."""
    for check in (_trains_something, _vision_learns, _frozen_are_filled, _best_is_measured):
        check(recipe)
    for setting in _SETTINGS:
        *parents, name = setting.key.split(".")
        for place, table in _tables(recipe, parents):
            value = getattr(table, name)
            if value == type(table).model_fields[name].default or value in setting.off:
                continue
            if reason := setting.idle(recipe, table):
                raise ValueError(f"{place}{name} = {json.dumps(value)} has no effect: {reason}")


def _tables(found: object, parents: list[str], place: str = "") -> Iterator[tuple[str, BaseModel]]:
    """The tables at `parents` below what is `found`, each with what is written before its keys."""
    if isinstance(found, tuple):
        for number, one in enumerate(found):
            yield from _tables(one, parents, f"{place}{number}.")
    elif not isinstance(found, BaseModel):
        return
    elif parents:
        yield from _tables(getattr(found, parents[0]), parents[1:], f"{place}{parents[0]}.")
    else:
        yield place, found


def _contrasts(recipe: Tables, _: object) -> str | None:
    if recipe.model.text is None:
        return f"a model of kind {recipe.model.kind} contrasts nothing; leave it out"
    # OpenVision 3 measures what it does not train: joint training is compared with its parts.
    if recipe.loss.contrastive or isinstance(recipe.model, OpenVision3Config):
        return None
    return "loss.contrastive is 0; leave it out, or raise loss.contrastive"


def _reads_lpips(recipe: Tables, table: Reconstruction) -> str | None:
    if table.perceptual != "lpips":
        return f'perceptual = "{table.perceptual}" reads no weights of LPIPS; leave it out'
    if any(stage.perceptual for stage in recipe.stages):
        return None
    return "no stage has a perceptual distance; leave it out, or set stages.N.perceptual"


def _takes(recipe: Tables, towers: tuple[str, ...], what: str) -> str | None:
    warm = recipe.warm_start
    if warm is None or warm.towers is None or not set(towers).isdisjoint(warm.towers):
        return None
    return f"warm_start.towers takes no tower {what}; leave it out, or add one of {', '.join(towers)}"


def _trims(recipe: Tables, _: object) -> str | None:
    if not isinstance(recipe.model, GenLipConfig) or not all(stage.drop_path for stage in recipe.stages):
        return None
    return "GenLIP trims nothing under stochastic depth; leave it out, or set stages.N.drop_path to 0"


def _reaches_vision(recipe: Tables, _: object) -> str | None:
    if "vision" not in recipe.frozen_towers:
        return None
    return "the vision tower is frozen, and the projection that would learn is dropped after the run; set it to 0"


def _where(name: str, value: object, reason: str) -> Callable[[Tables, Any], str | None]:
    """`reason` where another key of the same table has this value."""
    return lambda _, table: reason if getattr(table, name) == value else None


_SOFTMAX = _where(
    "kind",
    "softmax",
    "in the softmax equal texts are one vector, which shares its images anyway; leave it out, or set "
    'loss.kind = "sigmoid"',
)
_NO_BLOCKS = _where("order", "global", 'order = "global" has no blocks; leave it out, or set data.order = "blocks"')
_NO_SPIKES = _where("spikes", "off", 'spikes = "off" looks for none; leave it out, or set guards.spikes = "log"')
_NO_SHARDS = _where("mode", "ddp", 'mode = "ddp" replicates everywhere; leave it out, or set parallel.mode = "fsdp"')
_SETTINGS = (
    *(_Setting(f"loss.{key}", _contrasts) for key in ("kind", "captions", "logit_scales")),
    _Setting("loss.equal_texts", lambda recipe, loss: _contrasts(recipe, loss) or _SOFTMAX(recipe, loss)),
    _Setting("loss.reconstruction.folder", _reads_lpips),
    _Setting("data.block", _NO_BLOCKS),
    _Setting("data.window", _NO_BLOCKS),
    _Setting("augment.jitter_probability", _where("jitter", 0, "jitter is 0; leave it out, or raise jitter"), (0,)),
    _Setting("guards.spike_window", _NO_SPIKES),
    _Setting("guards.spike_deviations", _NO_SPIKES),
    _Setting("parallel.replicate", _NO_SHARDS),
    _Setting("run.trim_texts", _trims),
    _Setting("warm_start.patches", lambda recipe, _: _takes(recipe, ("vision",), "with patches")),
    _Setting("warm_start.vocabulary", lambda recipe, _: _takes(recipe, ("text", "decoder"), "with a vocabulary")),
    _Setting("warm_start.context", lambda recipe, _: _takes(recipe, ("text", "decoder"), "with a context")),
    _Setting("teacher.temperature", _where("similarity", 0, "similarity is 0; leave it out, or raise similarity")),
    _Setting("teacher.patches", _reaches_vision),
    _Setting("teacher.pooled", _reaches_vision, (0,)),
)


def _trains_something(recipe: Tables) -> None:
    loss, branch = recipe.loss, recipe.loss.reconstruction
    weights = [loss.contrastive, loss.caption]
    if branch is not None:
        weights += [branch.weight * one for one in (branch.pixels, branch.latents)]
        weights += [branch.weight * (stage.perceptual or 0) for stage in recipe.stages]
    if not any(weights) and not recipe.teacher and recipe.dense is None:
        raise ValueError("every weight in [loss] is 0, so that nothing is trained; raise loss.contrastive")


def _vision_learns(recipe: Tables) -> None:
    """What trains the vision tower alone is refused where that tower does not learn."""
    learner = "[[teacher]]" if recipe.teacher else None if recipe.dense is None else "[dense]"
    if learner is not None and recipe.optimizer.multipliers.vision == 0:
        raise ValueError(
            f"{learner} trains the vision tower, which optimizer.multipliers.vision = 0 leaves as it is; leave one of "
            "them out"
        )
    if "vision" not in recipe.frozen_towers:
        return
    for number, one in enumerate(recipe.teacher or ()):
        # Similarities go through the projection into the shared space, which is trained.
        if not one.similarity:
            raise ValueError(
                f"teacher.{number} trains the vision tower, which warm_start.frozen names; leave one of them out"
            )


def _frozen_are_filled(recipe: Tables) -> None:
    """Of `start` it is known later which towers it has: `training.setup.start.start_from` checks them."""
    warm = recipe.warm_start
    for tower in recipe.frozen_towers:
        if recipe.start is None and (tower != "text" or warm is None or warm.text is None):
            ways = "start or warm_start.text" if tower == "text" else "start"
            raise ValueError(
                f"warm_start.frozen names {tower!r}, which nothing fills: it would stay at its random initial values; "
                f"give {ways}, or leave it out"
            )


def _best_is_measured(recipe: Tables) -> None:
    """A metric without an evaluator's name is one of the validation, whose only loss is that of models without text."""
    metric = recipe.run.checkpoint_best
    if metric is None or "/" in metric:
        return
    place = f"run.checkpoint_best = {json.dumps(metric)} is not measured"
    other = 'or "NAME/METRIC" of a table [[evaluate]]'
    if recipe.data.validation is None:
        raise ValueError(f"{place} without data.validation; give it, {other}")
    if recipe.model.text is None and metric != "caption_loss":
        raise ValueError(
            f'{place}: a model of kind {recipe.model.kind} is validated by its captions; write "caption_loss", {other}'
        )
    if recipe.model.text is not None and metric == "caption_loss":
        raise ValueError(f'{place}: a model with a text tower is validated by its texts; write "top1", {other}')

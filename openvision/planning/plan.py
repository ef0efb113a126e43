"""Plan a recipe on given devices: compute, memory, time, cost and data of each stage, and warnings."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from openvision.hardware import Device, Range, model_flops_utilisation
from openvision.models.flops import TowerFlops, contrastive_flops, patches_of, sample_flops
from openvision.models.openvision2 import ModelConfig
from openvision.planning.beside import Additions, additions_of
from openvision.planning.cautions import warnings_of
from openvision.planning.cost import (
    LOADER_OVERHEAD,
    SAMPLE_KILOBYTES,
    Cost,
    StepTime,
    cost,
    decode_rate,
    step_time,
    stretch,
)
from openvision.planning.memory import (
    Checkpointing,
    Setting,
    Sharding,
    activation_bytes,
    loss_memory,
    peak_bytes,
    state_bytes,
)
from openvision.planning.parameters import Parameters, count_parameters
from openvision.planning.stage import Assumptions, Fit, StagePlan
from openvision.recipe.schema import Recipe
from openvision.recipe.sections import Stage

CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """A recipe on devices."""

    recipe: Recipe
    assumptions: Assumptions
    parameters: Parameters
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]

    @property
    def cost(self) -> Cost:
        """All stages."""
        first, *rest = (stage.cost for stage in self.stages)
        for other in rest:
            first = first + other
        return first

    @property
    def samples(self) -> int:
        """Samples seen in all stages."""
        return sum(stage.stage.samples for stage in self.stages)

    @property
    def flops(self) -> float:
        """Model operations of the whole training."""
        return float(sum(stage.stage.samples * stage.training for stage in self.stages))

    @property
    def overrides(self) -> tuple[str, ...]:
        """Overrides for --set that give the planned layout; () when none fits or none is needed."""
        run, parallel = self.recipe.run, self.recipe.parallel
        chosen = self.stages[0].chosen
        if chosen is None:
            return ()
        wanted = []
        if chosen.setting.checkpointing != run.activation_checkpointing:
            wanted.append(f"run.activation_checkpointing={chosen.setting.checkpointing}")
        mode = "fsdp" if chosen.setting.sharding == "sharded" else "ddp"
        if self.assumptions.devices > 1 and mode != parallel.mode:
            wanted.append(f"parallel.mode={mode}")
        for index, stage in enumerate(self.stages):
            if stage.chosen is not None and stage.chosen.parts != stage.stage.micro_batches:
                wanted.append(f"stages.{index}.micro_batches={stage.chosen.parts}")
        return tuple(wanted)

    @property
    def dataset_terabytes(self) -> Range:
        """The data set on disk."""
        pool = min(self.samples, self.assumptions.dataset_samples)
        return pool * SAMPLE_KILOBYTES[0] / 1e9, pool * SAMPLE_KILOBYTES[1] / 1e9


def make_plan(recipe: Recipe, assumptions: Assumptions) -> Plan:
    """Plan `recipe` without training it; teachers that are no released names are loaded and counted."""
    additions = additions_of(recipe)
    parameters = count_parameters(recipe.model, additions.trained(), additions.frozen())
    fits = [_fits(recipe, stage, parameters, assumptions, additions) for stage in recipe.stages]
    layout = _fastest(recipe, fits)
    stages = tuple(
        _plan_stage(recipe, stage, parameters, assumptions, found, None if layout is None else found[layout], additions)
        for stage, found in zip(recipe.stages, fits, strict=True)
    )
    return Plan(recipe, assumptions, parameters, stages, tuple(warnings_of(recipe, stages, assumptions)))


def _fastest(recipe: Recipe, fits: list[tuple[Fit, ...]]) -> int | None:
    """Index of the fastest layout that surely fits in all stages; micro-batches may differ between stages."""

    def work(layout: int) -> float:
        sizes = (stage.samples * stage.resolution**2 for stage in recipe.stages)
        return sum(size * found[layout].stretch.factor for size, found in zip(sizes, fits, strict=True))

    possible = [layout for layout in range(len(fits[0])) if all(found[layout].micro_batch for found in fits)]
    return min(possible, key=lambda layout: (round(work(layout) / work(possible[0]), 3), layout), default=None)


def texts_of(recipe: Recipe) -> int:
    """Kinds of text contrasted with each image."""
    return len(recipe.loss.texts)


def settings_of(recipe: Recipe, assumptions: Assumptions) -> Iterator[Setting]:
    """Every way to lay out the state and the activations, the fastest first."""
    base = Setting(
        bf16=recipe.run.precision != "float32",
        gpu=assumptions.device.gpu,
        devices=assumptions.devices,
        first_moment_bytes=2 if recipe.optimizer.first_moment == "bfloat16" else 4,
        average=recipe.optimizer.ema is not None,
        frozen=recipe.frozen_towers,
    )
    # The dense objective and native shapes are refused with FSDP2.
    sharded = assumptions.devices > 1 and recipe.dense is None and not any(stage.native for stage in recipe.stages)
    shardings: tuple[Sharding, ...] = ("replicated", "sharded") if sharded else ("replicated",)
    for checkpointing in CHECKPOINTING:
        for sharding in shardings:
            yield replace(base, checkpointing=checkpointing, sharding=sharding)


def _fits(
    recipe: Recipe, stage: Stage, parameters: Parameters, assumptions: Assumptions, additions: Additions
) -> tuple[Fit, ...]:
    model, texts, local = recipe.model, texts_of(recipe), local_batch(stage, assumptions)
    towers = _towers(recipe, stage, assumptions, additions)
    return tuple(
        _fit(model, parameters, stage.resolution, texts, setting, towers, local, assumptions.device, additions)
        for setting in settings_of(recipe, assumptions)
    )


def _towers(recipe: Recipe, stage: Stage, assumptions: Assumptions, additions: Additions) -> tuple[TowerFlops, ...]:
    """Operations of a sample, the model's and what is beside it."""
    texts, frozen = texts_of(recipe), recipe.frozen_towers
    towers = sample_flops(recipe.model, stage.resolution, texts, assumptions.caption_tokens, frozen=frozen)
    return towers + additions.flops(stage.resolution)


def local_batch(stage: Stage, assumptions: Assumptions) -> int:
    """Samples of a step on one device, rounded up."""
    return -(-stage.batch_size // assumptions.devices)


def _plan_stage(
    recipe: Recipe,
    stage: Stage,
    parameters: Parameters,
    assumptions: Assumptions,
    fits: tuple[Fit, ...],
    chosen: Fit | None,
    additions: Additions,
) -> StagePlan:
    model, texts, local = recipe.model, texts_of(recipe), local_batch(stage, assumptions)
    device, devices = assumptions.device, assumptions.devices
    towers = _towers(recipe, stage, assumptions, additions)
    training = sum(tower.training for tower in towers)
    factor = chosen.stretch.factor if chosen else 1.0
    parts = chosen.parts if chosen else 1
    sharded = chosen is not None and chosen.setting.sharding == "sharded"
    time = step_time(
        model, parameters, device, devices, assumptions.mfu, local, factor * training, texts, sharded, parts
    )
    rates = (stage.batch_size / time.total[1], stage.batch_size / time.total[0])
    cores = decode_rate(stage.resolution)
    peak = devices * device.peak_flops
    return StagePlan(
        stage=stage,
        local_batch=local,
        patches=patches_of(model.vision, stage.resolution),
        towers=towers,
        contrastive=contrastive_flops(model.embed_dim or 0, stage.batch_size, texts),
        losses=loss_memory(model, local, stage.batch_size, texts, chosen.micro_batch if chosen else 1),
        fits=fits,
        chosen=chosen,
        time=time,
        cost=cost(_hours(stage, time), device, devices, assumptions.price),
        mfu=(
            model_flops_utilisation(training, rates[0], peak),
            model_flops_utilisation(training, rates[1], peak),
        ),
        images_per_second=rates,
        decode_cores=(rates[0] / cores * LOADER_OVERHEAD[0], rates[1] / cores * LOADER_OVERHEAD[1]),
        terabytes_read=(stage.samples * SAMPLE_KILOBYTES[0] / 1e9, stage.samples * SAMPLE_KILOBYTES[1] / 1e9),
    )


def _hours(stage: Stage, time: StepTime) -> Range:
    return stage.steps * time.total[0] / 3600, stage.steps * time.total[1] / 3600


def _fit(
    model: ModelConfig,
    parameters: Parameters,
    resolution: int,
    texts: int,
    setting: Setting,
    towers: tuple[TowerFlops, ...],
    local: int,
    device: Device,
    additions: Additions,
) -> Fit:
    beside = additions.memory(resolution, texts, setting)
    own = activation_bytes(model, resolution, texts, setting)

    def peak(micro_batch: int) -> Range:
        return peak_bytes(model, parameters, resolution, texts, setting, micro_batch, local, beside)

    sizes = [size for size in range(local, 0, -1) if local % size == 0]
    certain = next((size for size in sizes if peak(size)[1] <= device.memory), 0)
    hopeful = next((size for size in sizes if peak(size)[0] <= device.memory), 0)
    parts = local // certain if certain else local
    return Fit(
        setting=setting,
        state=sum(state_bytes(parameters, setting).values()),
        per_sample=(own[0] + beside.kept[0], own[1] + beside.kept[1]),
        micro_batch=certain,
        hopeful=hopeful,
        parts=parts,
        peak=peak(certain or 1),
        stretch=stretch(towers, model, setting.checkpointing, parts),
    )

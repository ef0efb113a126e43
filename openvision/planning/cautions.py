"""Warnings of a plan: one sentence each, with the remedy."""

from collections.abc import Iterator, Sequence

from openvision.planning.stage import Assumptions, StagePlan
from openvision.recipe.schema import Recipe

YEAR = 365 * 24


def warnings_of(recipe: Recipe, stages: Sequence[StagePlan], assumptions: Assumptions) -> Iterator[str]:
    """All warnings of a plan."""
    if recipe.run.precision == "float32":
        yield (
            "the recipe computes in float32, the peak and the utilisation are those of bfloat16: expect a fraction of "
            'this speed, or --set run.precision="bfloat16"'
        )
    for index, plan in enumerate(stages):
        for warning in _stage_warnings(recipe, plan, assumptions):
            yield f"stage {index + 1}: {warning}"
    hours = sum(stage.cost.hours[0] for stage in stages)
    if hours > YEAR:
        yield f"at best {hours / YEAR:,.1f} years: use more devices or a smaller recipe"


def _stage_warnings(recipe: Recipe, plan: StagePlan, assumptions: Assumptions) -> Iterator[str]:
    stage, device, devices = plan.stage, assumptions.device, assumptions.devices
    if stage.batch_size % devices:
        yield (
            f"the batch of {stage.batch_size:,} does not divide by {devices} devices; figures are for "
            f"{plan.local_batch} on each. Choose a number of devices that divides it"
        )
    if plan.chosen is None:
        least = min(fit.peak[1] for fit in plan.fits)
        yield (
            f"does not fit: one sample needs up to {least / 2**30:,.1f} GiB of {device.memory / 2**30:,.1f} GiB in the "
            "most frugal layout; times ignore memory. Use more or larger devices"
        )
    else:
        yield from _layout_warnings(recipe, plan)
    yield from _speed_warnings(plan, assumptions)


def _layout_warnings(recipe: Recipe, plan: StagePlan) -> Iterator[str]:
    """Warn when the layout in the recipe does not surely fit."""
    assert plan.chosen is not None
    run, mode = recipe.run, "replicated" if recipe.parallel.mode == "ddp" else "sharded"
    own = [
        fit
        for fit in plan.fits
        if fit.setting.checkpointing == run.activation_checkpointing
        and (fit.setting.devices == 1 or fit.setting.sharding == mode)
    ]
    micro_batches = min((fit.parts for fit in own if fit.micro_batch), default=None)
    if micro_batches is not None and micro_batches <= plan.stage.micro_batches:
        return
    smallest = "does not fit" if micro_batches is None else f"surely fits only in {micro_batches} micro-batches"
    yield f"the layout in the recipe {smallest}; see 'Run as planned by' below"


def _speed_warnings(plan: StagePlan, assumptions: Assumptions) -> Iterator[str]:
    device, devices = assumptions.device, assumptions.devices
    cores = device.host_cores * devices
    if plan.decode_cores[1] > cores:
        sure = "bound" if plan.decode_cores[0] > cores else "perhaps bound"
        yield (
            f"{sure} by data: decoding takes {plan.decode_cores[0]:,.0f} to {plan.decode_cores[1]:,.0f} cores, "
            f"{cores:,} are assumed ({device.host_cores} a device)"
        )
    slowest, fastest = plan.time.total[1], plan.time.total[0]
    exposed = plan.time.exposed[0] / fastest
    if exposed > 0.1:
        yield (
            f"{plan.time.exposed[1] / slowest:.0%} to {exposed:.0%} of a step is not compute but update and "
            "communication: fewer devices cost less"
        )
    rows = (plan.chosen.micro_batch if plan.chosen else plan.local_batch) * (plan.patches + 1)
    ridge = device.peak_flops / device.bandwidth
    if rows < 4 * ridge:
        yield (
            f"matrix products of {rows:,} rows, {rows / ridge:.1f} times the size at which this device's arithmetic "
            "and memory bandwidth balance: the assumed utilisation is out of reach"
        )

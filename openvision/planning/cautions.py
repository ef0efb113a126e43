"""What a plan's reader must not overlook, one sentence each, with the remedy."""

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
        for warning in _of_stage(recipe, plan, assumptions):
            yield f"stage {index + 1}: {warning}"
    hours = sum(stage.cost.hours[0] for stage in stages)
    if hours > YEAR:
        yield f"at best {hours / YEAR:,.1f} years: this is no plan but a reason for more devices or a smaller recipe"


def _of_stage(recipe: Recipe, plan: StagePlan, assumptions: Assumptions) -> Iterator[str]:
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
            "most frugal layout; times are as if memory were no matter. Take more or larger devices"
        )
    else:
        yield from _layout(recipe, plan)
    yield from _speed(plan, assumptions)


def _layout(recipe: Recipe, plan: StagePlan) -> Iterator[str]:
    """Whether the recipe's own layout is one that fits."""
    assert plan.chosen is not None
    run, mode = recipe.run, "replicated" if recipe.parallel.mode == "ddp" else "sharded"
    own = [
        fit
        for fit in plan.fits
        if fit.setting.checkpointing == run.activation_checkpointing
        and (fit.setting.devices == 1 or fit.setting.sharding == mode)
    ]
    chunks = min((fit.parts for fit in own if fit.micro_batch), default=None)
    if chunks is not None and chunks <= plan.stage.micro_batches:
        return
    smallest = "does not fit" if chunks is None else f"surely fits only in {chunks} chunks"
    yield f"the layout written in the recipe {smallest}; see how to run it below"


def _speed(plan: StagePlan, assumptions: Assumptions) -> Iterator[str]:
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
            f"{plan.time.exposed[1] / slowest:.0%} to {exposed:.0%} of a step is update and traffic, not computing: "
            "with fewer devices each dollar goes further"
        )
    rows = (plan.chosen.micro_batch if plan.chosen else plan.local_batch) * (plan.patches + 1)
    ridge = device.peak_flops / device.bandwidth
    if rows < 4 * ridge:
        yield (
            f"matrix products of {rows:,} rows, {rows / ridge:.1f} times what balances this device's arithmetic and "
            "memory: the assumed utilisation is out of reach"
        )

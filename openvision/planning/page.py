"""Print a plan: tables in a terminal, the same text without frames elsewhere."""

from collections.abc import Callable, Iterable

from rich.table import Table

from openvision.hardware import GIB, PRICES_ASSUMED, Range
from openvision.planning.cost import DECODED_PER_CORE, ENERGY_OF_LIMIT, LOADER_OVERHEAD, SAMPLE_KILOBYTES
from openvision.planning.memory import Setting, state_bytes
from openvision.planning.plan import Plan
from openvision.planning.stage import Assumptions, Fit, StagePlan
from openvision.planning.units import count, number, percent, span
from openvision.terminal import Console

PLAIN_WIDTH = 118
_WORDS = ("checkpointing", "state", "verdict", "limit")


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Write the page to standard output, or to `console`."""
    out = console or Console(soft_wrap=False)
    if console is None and not out.is_terminal:
        out = Console(width=PLAIN_WIDTH)
    out.print(_headline(plan), highlight=False, markup=False)
    for build in (_work, _state, _losses, _layouts, _times, _data):
        out.print()
        out.print(build(plan, out.is_terminal))
    notes = {
        "Warnings": plan.warnings,
        "Run as planned by": tuple(f"--set {override}" for override in plan.overrides),
        "Assumptions": tuple(_assumptions(plan)),
    }
    for title, lines in notes.items():
        if lines:
            out.print(f"\n{title}", style="bold", highlight=False)
        for line in lines:
            out.print(f"- {line}", highlight=False, markup=False)


def _headline(plan: Plan) -> str:
    given, total = plan.assumptions, plan.cost
    days = f" ({span(_days(total.hours))} days)" if total.hours[1] > 72 else ""
    return (
        f"{plan.recipe.name} on {given.devices} x {given.device.name}\n"
        f"{count(plan.samples)} samples, {number(plan.flops / 1e18)} EFLOP. {span(total.hours)} hours{days}, "
        f"{span(total.device_hours)} device-hours, {span(total.kilowatt_hours)} kWh, {span(total.dollars)} US dollars."
    )


def _days(hours: Range) -> Range:
    return hours[0] / 24, hours[1] / 24


def _table(title: str, columns: Iterable[str], framed: bool) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=framed)
    if not framed:
        table.box = None
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 or name in _WORDS else "right")
    return table


def _work(plan: Plan, framed: bool) -> Table:
    heads = [f"{s.stage.resolution} px, {s.patches} patches" for s in plan.stages]
    table = _table("Model and work: GFLOP a sample, forward", ["tower", "parameters", *heads], framed)
    for index, tower in enumerate(plan.stages[0].towers):
        parameters = plan.parameters.towers.get(tower.name) or plan.parameters.frozen.get(tower.name)
        cells = [number(stage.towers[index].forward / 1e9) for stage in plan.stages]
        table.add_row(_tower_name(plan, tower.name), count(parameters) if parameters else "", *cells)
    for label, get in _totals():
        parameters = count(plan.parameters.total) if label == "forward" else ""
        table.add_row(label, parameters, *(number(get(stage) / 1e9) for stage in plan.stages), style="bold")
    table.add_row("beside it: contrastive logits", "", *(number(stage.contrastive / 1e9) for stage in plan.stages))
    return table


def _totals() -> tuple[tuple[str, Callable[[StagePlan], float]], ...]:
    return ("forward", lambda stage: stage.forward), ("forward and backward", lambda stage: stage.training)


def _tower_name(plan: Plan, name: str) -> str:
    return {
        "text": f"text, {len(plan.recipe.loss.texts)} a sample",
        "vocabulary": f"vocabulary, {plan.assumptions.caption_tokens:g} tokens",
    }.get(name, name)


def _state(plan: Plan, framed: bool) -> Table:
    kinds: dict[str, Setting] = {}
    for fit in plan.stages[0].fits:
        kinds.setdefault(fit.setting.sharding, fit.setting)
    states = {name: state_bytes(plan.parameters, setting) for name, setting in kinds.items()}
    rows = dict.fromkeys(row for state in states.values() for row in state)
    table = _table("State on each device, GiB", ["", *rows, "sum"], framed)
    for name, state in states.items():
        cells = [_gib(state[row]) if row in state else "" for row in rows]
        table.add_row(_SHARDING[name], *cells, _gib(sum(state.values())))
    return table


def _losses(plan: Plan, framed: bool) -> Table:
    columns = ["stage", "batch", "on each device", "InfoNCE, plain", "InfoNCE, chunked", "micro-batch"]
    table = _table("Losses on each device, GiB", [*columns, "all logits", "chunked"], framed)
    for index, plan_ in enumerate(plan.stages):
        loss, stage = plan_.losses, plan_.stage
        at_a_time = plan_.chosen.micro_batch if plan_.chosen else 1
        contrastive = map(_gib, (loss.contrastive_plain, loss.contrastive_chunked))
        caption = map(_gib, (loss.caption_plain, loss.caption_chunked))
        sizes = (f"{stage.batch_size:,}", f"{plan_.local_batch:,}")
        table.add_row(_stage(index, plan_), *sizes, *contrastive, f"{at_a_time:,}", *caption)
    return table


_SHARDING = {"replicated": "replicated (DDP)", "sharded": "sharded (FSDP)"}


def _layouts(plan: Plan, framed: bool) -> Table:
    memory = _gib(plan.assumptions.device.memory)
    columns = ["stage", "checkpointing", "state", "MiB a sample", "micro-batch", "number", "GiB", "time", "verdict"]
    table = _table(f"What fits into {memory} GiB (* the fastest that surely fits in all stages)", columns, framed)
    for index, stage in enumerate(plan.stages):
        for fit in stage.fits:
            table.add_row(
                _stage(index, stage) if fit is stage.fits[0] else "",
                fit.setting.checkpointing + (" *" if fit is stage.chosen else ""),
                _SHARDING[fit.setting.sharding],
                span((fit.per_sample[0] / 2**20, fit.per_sample[1] / 2**20)),
                f"{fit.micro_batch:,}",
                f"{fit.parts:,}" if fit.micro_batch else "",
                span((fit.peak[0] / GIB, fit.peak[1] / GIB)),
                f"x {fit.stretch.factor:.2f}",
                _verdict(stage, fit),
            )
    return table


def _verdict(stage: StagePlan, fit: Fit) -> str:
    if fit.micro_batch == stage.local_batch:
        return "fits in one"
    if not fit.micro_batch:
        return f"may fit {fit.hopeful:,}" if fit.hopeful else "does not fit"
    return "micro-batches" if fit.hopeful == fit.micro_batch else f"micro-batches, perhaps {fit.hopeful:,}"


def _times(plan: Plan, framed: bool) -> Table:
    columns = ["stage", "samples", "steps", "s a step", "exposed", "images/s", "MFU", "hours", "kWh", "US dollars"]
    table = _table("Time and cost", [*columns, "limit"], framed)
    for index, stage in enumerate(plan.stages):
        exposed = (stage.time.exposed[1] / stage.time.total[1], stage.time.exposed[0] / stage.time.total[0])
        table.add_row(
            _stage(index, stage),
            count(stage.stage.samples),
            f"{stage.stage.steps:,}",
            span(stage.time.total),
            percent(exposed),
            span(stage.images_per_second),
            percent(stage.mfu),
            *map(span, (stage.cost.hours, stage.cost.kilowatt_hours, stage.cost.dollars)),
            stage.time.limit,
        )
    total = plan.cost
    cells = map(span, (total.hours, total.kilowatt_hours, total.dollars))
    table.add_row("all", count(plan.samples), *[""] * 5, *cells, "", style="bold")
    return table


def _data(plan: Plan, framed: bool) -> Table:
    devices = plan.assumptions.devices
    columns = ["stage", "passes", "TB read", "images/s", "a device", "cores to decode", "cores assumed"]
    pool = min(plan.samples, plan.assumptions.dataset_samples)
    title = f"Data: {count(pool)} pairs, {span(plan.dataset_terabytes)} TB on disk"
    table = _table(title, columns, framed)
    for index, stage in enumerate(plan.stages):
        rate = stage.images_per_second
        table.add_row(
            _stage(index, stage),
            number(stage.stage.samples / pool),
            span(stage.terabytes_read),
            span(rate),
            span((rate[0] / devices, rate[1] / devices)),
            span(stage.decode_cores),
            f"{plan.assumptions.device.host_cores * devices:,}",
        )
    return table


def _stage(index: int, plan: StagePlan) -> str:
    return f"{index + 1}: {plan.stage.resolution} px"


def _gib(size: float) -> str:
    return number(size / GIB)


def _assumptions(plan: Plan) -> Iterable[str]:
    given, device = plan.assumptions, plan.assumptions.device
    rates = ", ".join(f"{rate:,.0f} at {size} px" for size, rate in DECODED_PER_CORE.items())
    yield (
        f"{device.name}: {number(device.peak_flops / 1e12)} TFLOP/s dense bf16, {_gib(device.memory)} GiB, "
        f"{number(device.bandwidth / 1e9)} GB/s, {device.watts:g} W ({device.source}); {device.per_node} in a host, "
        f"{number(device.link / 1e9)} GB/s between them, {number(device.network / 1e9)} GB/s out of a host"
    )
    yield (
        "MFU is model FLOPs over the dense bf16 peak: matrix products, 2 a multiply-add, no recomputation, "
        "masked halves of causal attention not counted"
    )
    yield (
        f"forward and backward reach {percent(given.mfu)} of the peak ({_grounds(given)}); on top "
        "come the update, gathered embeddings and communication that backward does not overlap, all at line rate"
    )
    yield (
        f"${given.price[0]:g} to ${given.price[1]:g} a device-hour ({PRICES_ASSUMED}, rough); energy is "
        f"{ENERGY_OF_LIMIT[0]:g} to {ENERGY_OF_LIMIT[1]:g} times power limit x hours, the upper with host and cooling"
    )
    yield (
        f"{SAMPLE_KILOBYTES[0]:g} to {SAMPLE_KILOBYTES[1]:g} kB a pair; a core decodes {rates} (images/s), the whole "
        f"loader takes {LOADER_OVERHEAD[0]:g} to {LOADER_OVERHEAD[1]:g} times as long; {device.host_cores} cores each"
    )
    if plan.recipe.model.decoder is not None:
        yield f"captions have {given.caption_tokens:g} target tokens on average, and only their logits are computed"
    yield (
        "memory: the lower value is what compiled blocks keep, the upper eager mode with 5 % of fragmentation; no "
        "checkpoints, evaluation or restarts are in the hours"
    )


def _grounds(given: Assumptions) -> str:
    """Whether the MFU of a plan was measured."""
    if given.device.measured and given.mfu == given.device.mfu:
        return f"measured: {given.device.measured}"
    return "an assumption; not measured"

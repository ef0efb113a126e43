"""One run in a process of its own: measure its speed, train for its time, measure it by the suite, write its row."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import torch

from ablations.budget import ENDLESS, Meeting, Speed, measure_speeds, plan_samples, spent
from ablations.rows import SPEEDS
from ablations.variants import PROFILES, Profile, Variant, parts_of, recipe_of, variant
from openvision.data.shards.dataset import ShardDataset
from openvision.evaluation.evaluators.base import Evaluator, measure_all
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.suites.own import validation_evaluators
from openvision.evaluation.suites.run import Settings, evaluated
from openvision.evaluation.suites.suite import load_suite, usable
from openvision.files import JsonObject, atomic_write_text, read_json_lines
from openvision.provenance import git_state, library_versions, processor_name
from openvision.runtime import resolve_device
from openvision.training.trainer import launch
from openvision.weights.load import load_checkpoint

VALIDATION = "validation"
# What a curve keeps of the validation: naming the main object, and finding a scene by a sentence.
_CURVE = ("seconds", "samples", "top1", "top5", "alt_t2i_r1", "sentence_t2i_r1", "sentence_t2i_r5", "caption_loss")
_FIRST = ("zero_shot", "retrieval")


@dataclass(frozen=True)
class Task:
    """A run, as the process that makes it is told."""

    table: str
    variant: str
    seed: int
    profile: str
    rate: float
    """Learning rate per 256 samples, of the first stage."""
    seconds: float | None
    """Time to train, or None for `samples`."""
    samples: int | None
    world: str
    """Version and number of the scenes: rows of another world are others."""
    data: str
    """Folder of training and validation scenes."""
    held_out: str
    """Folder that the suite reads."""
    vocabulary: str
    suite: str | None
    """None measures the validation alone: a run of the tuning."""
    device: str
    workers: int
    """Processes that decode; 0 decodes in the run's own."""
    evaluation_threads: int
    folder: str
    group: str
    """Folder where the runs that train at the same time meet."""
    members: tuple[str, ...]
    speeds: tuple[Speed, ...] = ()
    """Of each stage, as they were measured before; empty where the run measures them itself."""
    start: str | None = None
    """Model folder that the run starts from, or None for fresh weights."""
    start_seconds: float | None = None
    """Planned seconds of the run that made it."""

    @property
    def name(self) -> str:
        """Name of the run among all of one command."""
        # Its folder is emptied first, and must not be that of the model it starts from.
        started = "" if self.start is None else "-started"
        return f"{self.table}-{self.variant}-rate{self.rate:g}-seed{self.seed}{started}"

    @property
    def meeting(self) -> Meeting:
        """Where it waits for the others of its group."""
        return Meeting(Path(self.group), self.name, self.members)

    @property
    def row(self) -> Path:
        """File of what it has found so far."""
        return Path(self.folder) / "row.json"

    @staticmethod
    def read(path: Path) -> "Task":
        """The task in a file."""
        content = json.loads(path.read_text(encoding="utf-8"))
        speeds = tuple(Speed(**each) for each in content["speeds"])
        return Task(**content | {"members": tuple(content["members"]), "speeds": speeds})

    def write(self, path: Path) -> None:
        """Write it for the process that makes the run."""
        atomic_write_text(path, json.dumps(asdict(self), indent=1) + "\n")


@dataclass
class Trained:
    """What a training left: a model to be measured, and what it took."""

    model: EvaluatedModel
    speeds: list[Speed]
    planned: list[int]
    """Samples of each stage."""
    seconds: float
    curve: list[JsonObject]
    facts: JsonObject


def run(task: Task) -> None:
    """Make the run and write its row."""
    folder = Path(task.folder)
    # What an interrupted run trained was trained under another load.
    shutil.rmtree(folder, ignore_errors=True)
    chosen, profile = variant(task.variant), PROFILES[task.profile]
    torch.manual_seed(task.seed)
    begin = time.perf_counter()
    if task.table == SPEEDS:
        speeds = [asdict(speed) for speed in speeds_of(task, chosen, profile)]
        _write(task, _facts(task, chosen) | {"speeds": speeds, "measured": {}, "complete": True})
        return
    if chosen.program == "openvision":
        trained = train(task, chosen, profile)
    else:
        from ablations.rivals import train_rival

        trained = train_rival(task, chosen, profile)
    task.meeting.wait("trained")
    torch.set_num_threads(task.evaluation_threads)
    evaluating = time.perf_counter()
    numbers = validation_numbers(trained.model, Path(task.data))
    row: JsonObject = {
        **_facts(task, chosen),
        "seconds": round(trained.seconds, 1),
        "samples": sum(trained.planned),
        "stages": [
            {"resolution": pixels, "samples": count}
            for (pixels, _), count in zip(parts_of(chosen, profile), trained.planned, strict=True)
        ],
        "speeds": [asdict(speed) for speed in trained.speeds],
        "curve": trained.curve,
        "validation": numbers,
        "score": score(numbers),
        "measured": {},
        "complete": False,
        **trained.facts,
    }
    # Written after every evaluator: what is measured when the time is up counts.
    for entry in chain([{}], measured_by(trained.model, task.suite, task.held_out)):
        now = time.perf_counter()
        row["measured"] |= entry
        row |= {"evaluation_seconds": round(now - evaluating, 1), "all_seconds": round(now - begin, 1)}
        _write(task, row)
    _write(task, row | {"complete": True})


def _facts(task: Task, chosen: Variant) -> JsonObject:
    """What a row says of the run, its machine and its code."""
    return {
        "table": task.table,
        "variant": task.variant,
        "title": chosen.title,
        "seed": task.seed,
        "world": task.world,
        "suite": task.suite,
        "profile": task.profile,
        "rate": task.rate,
        "planned_seconds": task.seconds,
        "planned_samples": task.samples,
        "start": task.start,
        "start_seconds": task.start_seconds,
        "at_once": len(task.members),
        "loader_workers": task.workers,
        "machine": machine(task.device),
        "git": git_state(),
        "libraries": library_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def speeds_of(task: Task, chosen: Variant, profile: Profile) -> list[Speed]:
    """Speed of each stage of a variant, measured now."""
    if chosen.program != "openvision":
        from ablations.rivals import rival_speed

        return [rival_speed(task, chosen, profile)]
    parts = parts_of(chosen, profile)
    settings = (*_settings(task), "run.log_every=1_000_000_000")
    endless = recipe_of(chosen, profile, [ENDLESS] * len(parts), task.rate, task.seed, Path(task.vocabulary), settings)
    folder = Path(task.folder) / "speed"
    try:
        return measure_speeds(
            endless, Path(task.data), folder, profile.calibration_seconds, profile.warm_batches, task.meeting
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settings(task: Task) -> tuple[str, ...]:
    start = () if task.start is None else (f"start={task.start}",)
    return f"run.device={task.device}", f"run.loader_workers={task.workers}", *start


def _write(task: Task, row: JsonObject) -> None:
    atomic_write_text(task.row, json.dumps(row) + "\n")


def train(task: Task, chosen: Variant, profile: Profile) -> Trained:
    """Train by `openvision train`'s own code."""
    folder, data = Path(task.folder), Path(task.data)
    shares = [share for _, share in parts_of(chosen, profile)]
    speeds = list(task.speeds)
    if task.seconds is None:
        assert task.samples is not None
        batches = [max(1, int(share * task.samples / profile.batch_size)) for share in shares]
        planned = [count * profile.batch_size for count in batches]
    else:
        speeds = speeds or speeds_of(task, chosen, profile)
        planned = plan_samples(speeds, shares, task.seconds, profile.batch_size)
    recipe = recipe_of(chosen, profile, planned, task.rate, task.seed, Path(task.vocabulary), _settings(task))
    task.meeting.wait("train")
    model = launch(recipe, data, folder)
    assert model is not None
    lines = read_json_lines(folder / "metrics.jsonl")
    waits = [line["data_wait"] for line in lines if "data_wait" in line]
    checkpoint = load_checkpoint(model)
    how = Settings(
        preprocessing=chosen.preprocessing,
        device=task.device,
        threads=task.evaluation_threads,
        bfloat16=task.device != "cpu",
        batch_size=256,
    )
    # They serve a resumed run, and no run of these is resumed.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    seconds = float(checkpoint.provenance["training_seconds"])
    curve = [{key: line[key] for key in _CURVE if key in line} for line in lines if line.get("kind") == "eval"]
    if task.speeds:
        # By the clock that the speeds were measured with: the wall's knows what else ran here.
        ends = spent(speeds, planned)
        curve, took = [point | {"seconds": end} for point, end in zip(curve, ends, strict=True)], ends[-1]
    else:
        took = seconds
    return Trained(
        evaluated(checkpoint, how),
        speeds,
        planned,
        took,
        curve,
        {
            "wall_seconds": seconds,
            "tflops": checkpoint.provenance["training_tflops"],
            "data_wait": round(sum(waits) / len(waits), 3) if waits else None,
            "parameters": sum(parameter.numel() for parameter in _whole(checkpoint).parameters()),
        },
    )


def _whole(checkpoint: object) -> torch.nn.Module:
    model = getattr(checkpoint, "model", None) or getattr(checkpoint, "captioner", None)
    assert isinstance(model, torch.nn.Module)
    return model


def validation_numbers(model: EvaluatedModel, data: Path) -> dict[str, float]:
    """Numbers on the validation scenes, "evaluator/metric" -> value."""
    found = validation_evaluators(ShardDataset(data / VALIDATION), model.has_text)
    return _numbers(found, model, "")


def _numbers(evaluators: Sequence[Evaluator], model: EvaluatedModel, root: str) -> dict[str, float]:
    return {
        f"{evaluator.title}/{metric}": value
        for evaluator, measured in measure_all(evaluators, model, root)
        for metric, value in measured.values.items()
    }


def score(numbers: dict[str, float]) -> float:
    """What a learning rate is chosen by: naming and retrieval, or the caption loss where there is no text tower."""
    if (loss := numbers.get("caption_loss/caption_loss")) is not None:
        return -loss
    chosen = [numbers[name] for name in ("names/top5", "alt-texts/t2i_r5", "first sentences/t2i_r5")]
    return sum(chosen) / len(chosen)


def measured_by(model: EvaluatedModel, suite: str | None, data: str) -> Iterator[JsonObject]:
    """Kind and values of every evaluator of a suite that the model can answer, by its title; headlines come first."""
    if suite is None:
        return
    chosen = load_suite(suite)
    present, _ = chosen.present(data, skip_missing=False)
    able, _ = usable(present, model.has_text, model.has_decoder, model.preprocessing == "native")
    ordered = sorted(able, key=lambda evaluator: evaluator.kind not in _FIRST)
    for evaluator, measured in measure_all(ordered, model, data):
        yield {evaluator.title: {"kind": evaluator.kind, "values": measured.values}}


def machine(device: str) -> JsonObject:
    """What the run ran on."""
    where = resolve_device(device)
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(where) if where.type == "cuda" else None,
    }

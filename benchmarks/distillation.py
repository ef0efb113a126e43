"""A small student with and without a teacher, for equal seconds of processor time on scenes.

    python benchmarks/distillation.py runs/quickstart/model runs/quickstart/scenes --seconds 60 --seeds 0 1 2

The teacher is the quickstart's model; the student has half its width, its three stages in one, and its optimizer and
initial values. How many samples a run sees is set by its own speed, which the first steps measure, the teacher's
forward pass included. The arms `text*` take the teacher's text tower and leave it as it is; `*_cached` read features
that --features holds, which are made before the first run and whose time is not the run's; `imagenet*` learn from
EfficientNet-Lite0 (extra `teacher`) instead. Rows are added to --out, one a run.

    python benchmarks/distillation.py runs/quickstart/model runs/quickstart/scenes --cost

measures what the teacher costs when it reads every batch and when its features come from disk, and what making them
costs, in seconds of processor time.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from openvision.data.shards.dataset import ShardDataset
from openvision.files import JsonObject, append_lines, atomic_write_text, read_json_lines
from openvision.provenance import processor_name
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.training.distillation import cache_of, open_teacher
from openvision.training.run.log import NoLog
from openvision.training.run.throughput import Meter
from openvision.training.setup.data import DeviceBatches, open_loader
from openvision.training.step import Step
from openvision.training.trainer import Trainer
from openvision.untrusted import json_text

BATCH = 64
SPEED_STEPS = 8
VISION = {
    "width": 64,
    "depth": 3,
    "mlp_dim": 256,
    "heads": 1,
    "patch_size": 8,
    "image_size": 64,
    "init": "by_width",
}
TEXT = {
    "width": 128,
    "depth": 2,
    "mlp_dim": 512,
    "heads": 2,
    "vocab_size": 1024,
    "context_length": 24,
    "pad_id": 0,
    "pool": "mean",
}


@dataclass(frozen=True)
class Arm:
    """What a student is given."""

    weights: dict[str, float] = field(default_factory=dict)
    """Of the teacher's pooled vectors, patches and similarities; without any there is no teacher."""
    inherits_text: bool = False
    """Its text tower is the teacher's, and is not trained."""
    cached: bool = False
    """Features come from disk."""
    imagenet: bool = False
    """They are EfficientNet-Lite0's, with its ImageNet weights, instead of the given teacher's."""


EVERYTHING = {"pooled": 1.0, "patches": 1.0, "similarity": 1.0}
ARMS = {
    "scratch": Arm(),
    "pooled": Arm({"pooled": 1.0}),
    "similarity": Arm({"pooled": 0.0, "similarity": 1.0}),
    "all": Arm(EVERYTHING),
    "all_cached": Arm(EVERYTHING, cached=True),
    "text": Arm(inherits_text=True),
    "text_all": Arm(EVERYTHING, inherits_text=True),
    "text_all_cached": Arm(EVERYTHING, inherits_text=True, cached=True),
    "imagenet_cached": Arm({"pooled": 1.0, "similarity": 1.0}, cached=True, imagenet=True),
}
METRICS = ("top1", "top5", "t2i_r5", "sentence_t2i_r5")
# Steps of a measurement of cost, those before it, and its repetitions.
COST_STEPS, COST_WARM, COST_REPEATS = 10, 2, 3
VIEWS = 1
"""Fixed views of an image in a cache: runs of minutes read few images twice."""


def recipe_of(arm: str, teacher: Path, seed: int, steps: int, cache: Path | None = None) -> Recipe:
    """The student's recipe for `steps` updates."""
    given = ARMS[arm]
    source = {"library": "efficientnet_lite", "source": "imagenet"} if given.imagenet else {"source": str(teacher)}
    table: JsonObject = {"teacher": [{**source, "name": "teacher", **given.weights}]} if given.weights else {}
    if given.inherits_text:
        table |= {"start": str(teacher), "warm_start": {"towers": ["text"], "frozen": ["text"]}}
    augment = {"crop_area": [0.8, 1.0], "jitter": 0.1, "grayscale_probability": 0}
    if cache is not None:
        table["teacher"][0]["cache"] = str(cache)
        augment["views"] = VIEWS
    samples = steps * BATCH
    stage = {"resolution": 64, "samples": samples, "batch_size": BATCH, "base_learning_rate": 6e-3}
    return parse_recipe(
        {
            "name": arm,
            "seed": seed,
            "model": {
                "embed_dim": 128,
                "vision": VISION,
                "text": TEXT,
            },
            "loss": {"caption": 0, "texts": ["alt", "sentence"]},
            "augment": augment,
            "optimizer": {"kind": "muon"},
            "data": {"train": "train", "validation": "validation", "tokenizer": str(teacher)},
            "stages": [stage | {"warmup_samples": samples // 10}],
            "run": {"log_every": 50, "evaluate_every": 10**9, "checkpoint_every": 10**9, "device": "cpu"},
            **table,
        },
        arm,
    )


def make_features(arm: str, teacher: Path, data: Path, folder: Path) -> JsonObject:
    """Make the features that an arm reads from `folder`, unless they are there; what they cost, for its rows."""
    recipe, datasets = recipe_of(arm, teacher, 0, 1, folder), [ShardDataset(data / "train")]
    assert recipe.teacher is not None
    loaded = open_teacher(recipe.teacher[0])
    cache = cache_of(recipe.teacher[0], loaded, recipe.augment)
    if not cache.missing(datasets):
        return {}
    begin = time.process_time()
    cache.fill(datasets, loaded)
    return {"made_s_per_view": round((time.process_time() - begin) / (len(datasets[0]) * VIEWS), 6)}


def train(
    arm: str, teacher: Path, data: Path, seed: int, steps: int, cache: Path | None
) -> tuple[float, dict[str, float]]:
    """Seconds of processor time of the updates, and the validation's numbers."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe_of(arm, teacher, seed, steps, cache), data, Path(folder) / "run")
        measured: list[float] = []
        evaluate = trainer._evaluate

        def timed(*arguments: object, **options: object) -> bool:
            measured.append(time.process_time())
            return evaluate(*arguments, **options)  # pyright: ignore[reportArgumentType]

        trainer._evaluate = timed
        begin = time.process_time()
        trainer.run()
        lines = read_json_lines(Path(folder) / "run" / "metrics.jsonl")
        numbers = next(line for line in reversed(lines) if line.get("split") == "validation")
        return measured[-1] - begin, {name: numbers[name] for name in METRICS}


def step_seconds(arm: str, teacher: Path, data: Path, folder: Path, cache: Path | None = None) -> float:
    """Processor seconds of an update, loading included: the mean of COST_STEPS after COST_WARM."""
    recipe = recipe_of(arm, teacher, 0, COST_WARM + COST_STEPS, cache)
    trainer = Trainer(recipe, data, Path(tempfile.mkdtemp(dir=folder)) / "run")
    parts, stage = trainer.parts, recipe.stages[0]
    with open_loader(
        recipe, stage, parts.dataset, parts.tokenizer, parts.processes, 0, parts.folder, parts.features
    ) as loader:
        batches, meter = DeviceBatches(iter(loader), parts.processes.device), Meter(parts.processes.device, None)
        step = Step(parts, stage, batches, meter, NoLog(), trainer.watchdog, trainer.stop, trainer.guard)
        for _ in range(COST_WARM):
            step()
        begin = time.process_time()
        for _ in range(COST_STEPS):
            step()
        return (time.process_time() - begin) / COST_STEPS


def cost(teacher: Path, data: Path, out: Path) -> None:
    """Compare steps without a teacher, with one that reads every batch, and with one that is read from disk."""
    datasets = [ShardDataset(data / "train")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in ("pooled", "all"):
            recipe = recipe_of(arm, teacher, 0, COST_STEPS, Path(folder) / arm)
            assert recipe.teacher is not None
            table = recipe.teacher[0]
            loaded = open_teacher(table)
            cache = cache_of(table, loaded, recipe.augment)
            stored = cache.bytes_for(cache.missing(datasets))
            begin = time.process_time()
            cache.fill(datasets, loaded)
            views = len(datasets[0]) * VIEWS
            made = (time.process_time() - begin) / views
            # In turns, so that what else the machine does meets all alike.
            measured = [
                (
                    step_seconds("scratch", teacher, data, Path(folder)),
                    step_seconds(arm, teacher, data, Path(folder)),
                    step_seconds(arm, teacher, data, Path(folder), Path(folder) / arm),
                )
                for _ in range(COST_REPEATS)
            ]
            alone, computed, cached = (statistics.median(column) for column in zip(*measured, strict=True))
            rows.append(
                {
                    "arm": arm,
                    "step_without_teacher_s": round(alone, 4),
                    "step_computed_s": round(computed, 4),
                    "step_cached_s": round(cached, 4),
                    "all_steps_s": [[round(value, 4) for value in one] for one in measured],
                    "fill_s_per_view": round(made, 6),
                    "bytes_per_view": round(stored / views),
                }
            )
            print(json_text(rows[-1]), flush=True)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": processor_name(), "threads": 1},
        "torch": torch.__version__,
        "batch": BATCH,
        "views": VIEWS,
        "results": rows,
    }
    atomic_write_text(out, json.dumps(report, indent=2) + "\n")


def main() -> None:
    """Train every arm for every seed and print its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--cost", action="store_true", help="measure the cost of the teacher, cached and not")
    parser.add_argument("--features", type=Path, default=Path("runs/distillation-features"), help="of arms *_cached")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, help="distillation.jsonl or distillation_cost.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.cost:
        cost(arguments.teacher, arguments.data, arguments.out or results / "distillation_cost.json")
        return
    out = arguments.out or results / "distillation.jsonl"
    caches = {arm: arguments.features if ARMS[arm].cached else None for arm in arguments.arms}
    made = {
        arm: make_features(arm, arguments.teacher, arguments.data, cache) if cache else {}
        for arm, cache in caches.items()
    }
    for seed in arguments.seeds:
        for arm in arguments.arms:
            of_arm = (arm, arguments.teacher, arguments.data, seed)
            few, many = (train(*of_arm, steps, caches[arm])[0] for steps in (SPEED_STEPS, 4 * SPEED_STEPS))
            steps = max(SPEED_STEPS, int(arguments.seconds / (many - few) * 3 * SPEED_STEPS))
            seconds, numbers = train(*of_arm, steps, caches[arm])
            row = {"arm": arm, "seed": seed, "samples": steps * BATCH, "cpu_seconds": round(seconds, 1), **numbers}
            row |= made[arm]
            row |= {
                "planned_seconds": arguments.seconds,
                "teacher": str(arguments.teacher),
                "data": str(arguments.data),
                "date": datetime.now(UTC).date().isoformat(),
                "machine": processor_name(),
                "torch": torch.__version__,
            }
            append_lines(out, json_text(row) + "\n")
            print(json_text(row), flush=True)


if __name__ == "__main__":
    main()

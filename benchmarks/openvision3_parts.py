"""Does joint training help or hurt? OpenVision 3 on scenes: all losses, understanding alone, reconstruction alone.

    openvision data scenes runs/scenes --train 8000 --held-out 500 --objects 24
    openvision autoencoder runs/scenes/train -o runs/autoencoder --steps 1600 --batch-size 16
    .venv/bin/python benchmarks/openvision3_parts.py -o benchmarks/results/openvision3_parts.json --data runs/scenes
        --autoencoder runs/autoencoder --work runs/openvision3_parts --seeds 0 1 2

The parts see the same samples in the same order at the same learning rates: the question is what one branch does to the
other, and the paper's comparison is at equal steps too. At equal time a part that leaves a branch out would see more
samples, and its cost would be mixed with its effect; the processor time of each stands beside. So what else the machine
does changes nothing.

A part leaves out the other's losses by a weight of 0; they are measured all the same. Controls: one colour for all
images, the autoencoder alone, an untrained encoder, chance. One process of one thread; the same command resumes.
"""

import argparse
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from recaption_loop import once

from openvision.evaluation.evaluators.base import Evaluator, measure_all
from openvision.evaluation.evaluators.caption_loss import CaptionLoss
from openvision.evaluation.evaluators.probes import LinearProbe
from openvision.evaluation.evaluators.reconstruction import Reconstruction
from openvision.evaluation.evaluators.retrieval import Retrieval
from openvision.evaluation.evaluators.zero_shot import ZeroShot
from openvision.evaluation.suites.run import Settings, evaluated
from openvision.files import JsonObject, atomic_write_text, read_json, read_json_lines
from openvision.provenance import git_state, library_versions, processor_name
from openvision.recipe.schema import Recipe, load_recipe
from openvision.terminal import echo
from openvision.training.trainer import launch
from openvision.weights.load import load_checkpoint

RECIPE = Path(__file__).parents[1] / "recipes" / "openvision3" / "scenes.toml"
PARTS = {
    "joint": [],
    "understanding alone": ["loss.reconstruction.weight=0.0"],
    "reconstruction alone": ["loss.contrastive=0.0", "loss.caption=0.0"],
}
UNTRAINED = "untrained"
"""One update of next to nothing, of the first seed alone."""
COLUMNS = {
    "psnr": ("PSNR, dB", 1),
    "ssim": ("SSIM", 1),
    "l1": ("pixel L1", 1),
    "latents_l1": ("latent L1", 1),
    "top1": ("named, top-1 %", 100),
    "top5": ("top-5 %", 100),
    "t2i_r5": ("sentence to scene R@5 %", 100),
    "caption_loss": ("caption, nats a token", 1),
    "probe": ("linear probe %", 100),
    "contrastive": ("contrastive loss, last tenth", 1),
    "seconds": ("processor s", 1),
}
"""Metric -> its name in the table, and what it is multiplied by there."""
_VALIDATION, _TRAIN, _LOG_EVERY = "validation", "train", 5


def recipe_of(part: str, seed: int, samples: int, autoencoder: Path) -> Recipe:
    """The recipe of the scenes in one stage of so many samples."""
    shape = read_json(autoencoder / "config.json")
    stage = load_recipe(RECIPE, []).stages[-1]
    samples, rate = (stage.batch_size, 1e-12) if part == UNTRAINED else (samples, stage.base_learning_rate)
    table = (
        f"resolution={stage.resolution}, samples={samples}, batch_size={stage.batch_size}, "
        f"base_learning_rate={rate}, warmup_samples={samples // 20}"
    )
    return load_recipe(
        RECIPE,
        [
            *PARTS.get(part, []),
            f"seed={seed}",
            f"model.vision.autoencoder.source={autoencoder}",
            f"model.vision.autoencoder.scale={shape['scale']}",
            f"stages=[{{{table}}}]",
            "data.validation=none",
            f"run.log_every={_LOG_EVERY}",
            "run.device=cpu",
            f"run.checkpoint_every={10**9}",
        ],
    )


def evaluators(limit: int, probe_train: int) -> dict[str, Evaluator]:
    """What is measured on the validation scenes."""
    return {
        "reconstruction": Reconstruction(data=_VALIDATION, limit=limit, stand_in=False),
        "names": ZeroShot(data=_VALIDATION, label="name"),
        "sentences": Retrieval(data=_VALIDATION, text="synthetic", sentences=True, captions=1),
        "captions": CaptionLoss(data=_VALIDATION),
        "probe": LinearProbe(data=_VALIDATION, label="name", train=_TRAIN, train_limit=probe_train),
    }


def measure(run: Path, data: Path, limit: int, probe_train: int) -> dict[str, float]:
    """Reconstruction and understanding of the validation scenes, and the contrastive loss the training ended with."""
    chosen = evaluators(limit, probe_train)
    model = evaluated(load_checkpoint(run / "model"), Settings(device="cpu", threads=1, bfloat16=False))
    found = dict(zip(chosen, (one for _, one in measure_all(list(chosen.values()), model, data)), strict=True))
    values = dict(found["reconstruction"].values)
    values |= {name: found["names"].values[name] for name in ("top1", "top5")}
    values |= {"t2i_r5": found["sentences"].values["t2i_r5"], "probe": found["probe"].values["top1"]}
    values["caption_loss"] = found["captions"].values["caption_loss"]
    lines = [line["contrastive"] for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    return values | {"contrastive": mean(lines[-max(1, len(lines) // 10) :])}


def train_and_measure(
    part: str, seed: int, folder: Path, data: Path, samples: int, autoencoder: Path, limit: int, probe_train: int
) -> JsonObject:
    """A row: the numbers of one part and seed."""
    torch.manual_seed(seed)
    begin = time.process_time()
    launch(recipe_of(part, seed, samples, autoencoder), data, folder)
    trained = time.process_time() - begin
    values = measure(folder, data, limit, probe_train)
    measured = time.process_time() - begin - trained
    return {"part": part, "seed": seed, "seconds": round(trained, 1), "evaluation_seconds": round(measured, 1)} | {
        name: round(value, 5) for name, value in values.items()
    }


def summary(rows: Sequence[JsonObject]) -> JsonObject:
    """Mean and standard deviation over the seeds, by part and metric."""
    found: JsonObject = {}
    for part in (*PARTS, UNTRAINED):
        own = [row for row in rows if row["part"] == part]
        if own:
            found[part] = {name: _spread([row[name] for row in own]) for name in COLUMNS}
    return found


def differences(rows: Sequence[JsonObject]) -> JsonObject:
    """Joint minus each part alone, of the same seed: mean and standard deviation over seeds."""
    by = {(row["part"], row["seed"]): row for row in rows}
    seeds = sorted(seed for part, seed in by if part == "joint")
    found: JsonObject = {}
    for part in (name for name in PARTS if name != "joint"):
        both = [(by["joint", seed], by[part, seed]) for seed in seeds if (part, seed) in by]
        if both:
            found[part] = {name: _spread([one[name] - other[name] for one, other in both]) for name in COLUMNS}
    return found


def _spread(values: Sequence[float]) -> JsonObject:
    deviation = round(stdev(values), 5) if len(values) > 1 else None
    return {"mean": round(mean(values), 5), "deviation": deviation, "runs": len(values)}


def table(content: JsonObject) -> str:
    """Markdown: a row for each part, control and difference."""
    rows = [
        f"| | {' | '.join(name for name, _ in COLUMNS.values())} |",
        f"|---|{'---:|' * len(COLUMNS)}",
    ]
    rows += [_row(part, numbers) for part, numbers in content["summary"].items()]
    first = next(iter(content["rows"]))
    for prefix, title in (("constant_", "one colour for all"), ("autoencoder_", "autoencoder alone")):
        known = {name: {"mean": first[prefix + name], "deviation": None} for name in COLUMNS if prefix + name in first}
        rows.append(_row(title, known))
    rows += [_row(f"joint minus {part}", numbers, sign="+") for part, numbers in content["differences"].items()]
    return "\n".join(rows) + "\n"


def _row(title: str, numbers: JsonObject, sign: str = "") -> str:
    cells = []
    for name, (_, factor) in COLUMNS.items():
        if name not in numbers:
            cells.append("–")
            continue
        digits = 1 if factor == 100 or name == "seconds" else 2 if name == "psnr" else 3
        value, deviation = factor * numbers[name]["mean"], numbers[name]["deviation"]
        spread = "" if deviation is None else f" ± {factor * deviation:.{digits}f}"
        cells.append(f"{value:{sign}.{digits}f}{spread}")
    return f"| {title} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure what is missing, and write rows, sums and the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of scenes")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs, which a later start resumes from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=6_400, help="of each training")
    parser.add_argument("--limit", type=int, default=200, help="images that reconstruction is measured on")
    parser.add_argument("--probe-train", type=int, default=1500, help="images that the linear probe learns from")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    autoencoder = chosen.autoencoder.resolve()
    job = {"samples": chosen.samples, "limit": chosen.limit, "probe_train": chosen.probe_train}
    if once(chosen.work / "job.json", lambda: job) != job:
        raise SystemExit(f"{chosen.work} belongs to other --samples, --limit or --probe-train; choose another --work")
    rows: list[JsonObject] = []
    for seed in chosen.seeds:
        for part in (*PARTS, *([UNTRAINED] if seed == chosen.seeds[0] else [])):
            folder = chosen.work / f"{part.replace(' ', '-')}-{seed}"
            act = partial(train_and_measure, part, seed, folder, chosen.data, chosen.samples, autoencoder)
            rows.append(once(folder.with_suffix(".json"), partial(act, chosen.limit, chosen.probe_train)))
            content: JsonObject = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": processor_name(),
                "threads": 1,
                **job,
                "autoencoder": read_json(autoencoder / "config.json"),
                "git": git_state(),
                "libraries": library_versions(),
                "summary": summary(rows),
                "differences": differences(rows),
                "rows": rows,
            }
            atomic_write_text(chosen.output, json.dumps(content, indent=1) + "\n")
            atomic_write_text(chosen.output.with_suffix(".md"), table(content))
    echo(table(read_json(chosen.output)))


if __name__ == "__main__":
    main()

"""The quickstart's towers with and without the dense objective, for equal seconds of processor time on scenes.

    python benchmarks/dense.py runs/scenes --seconds 250 --seeds 0

How many samples a run sees is set by its own speed, which the first steps measure, the averaged tower and the second
pass included. Runs are kept in --work: one that is there is measured again and not trained. Rows are added to --out.
"""

import argparse
import time
from pathlib import Path

import torch

from openvision.evaluation.evaluators.base import Evaluator, measure_all, parse_evaluators
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.files import append_lines, atomic_write_text, read_json
from openvision.recipe.schema import Recipe, load_recipe, parse_recipe
from openvision.training.trainer import Trainer
from openvision.untrusted import json_text
from openvision.weights.folder import load_folder

BATCH, SPEED_STEPS = 64, 4
ARMS: dict[str, dict[str, object]] = {
    "plain": {},
    "dense": {"dense": {"weight": 1.0}},
    "dense-light": {"dense": {"weight": 0.3}},
    "registers": {"registers": 4},
    "map": {"pool": "map"},
}
ROOT = Path(__file__).parents[1]


def recipe_of(arm: str, seed: int, steps: int) -> Recipe:
    """Plain CLIP in one stage at 64 px, for `steps` updates."""
    content = load_recipe(ROOT / "recipes" / "quickstart_clip.toml").model_dump(exclude_none=True)
    change = dict(ARMS[arm])
    if "dense" in change:
        content["dense"] = change.pop("dense")
    content["model"]["vision"] |= change
    samples = steps * BATCH
    stage = {"resolution": 64, "samples": samples, "batch_size": BATCH, "base_learning_rate": 3e-3}
    never = {"log_every": 50, "evaluate_every": 10**9, "checkpoint_every": 10**9, "device": "cpu"}
    content |= {"name": arm, "seed": seed, "stages": [stage | {"warmup_samples": samples // 10}], "run": never}
    return parse_recipe(content, arm)


def train(recipe: Recipe, data: Path, folder: Path) -> float:
    """Seconds of processor time of a run."""
    begin = time.process_time()
    Trainer(recipe, data, folder).run()
    return time.process_time() - begin


def run(arm: str, data: Path, seed: int, seconds: float, folder: Path) -> None:
    """Train an arm for so many seconds, unless `folder` has it."""
    facts = folder / "benchmark.json"
    if facts.exists():
        return
    few, many = (
        train(recipe_of(arm, seed, steps), data, folder.with_name(f"{folder.name}-speed{steps}"))
        for steps in (SPEED_STEPS, 4 * SPEED_STEPS)
    )
    steps = max(SPEED_STEPS, int(seconds / (many - few) * 3 * SPEED_STEPS))
    spent = train(recipe_of(arm, seed, steps), data, folder)
    atomic_write_text(facts, json_text({"samples": steps * BATCH, "cpu_seconds": round(spent, 1)}))


def evaluators() -> list[Evaluator]:
    """What is measured on validation scenes."""
    masks = {"data": "validation", "mask": "mask_png", "limit": 100}
    tables = [
        {"kind": "patch_probe", **masks, "train": "train", "train_limit": 150, "train_patches": 4000},
        {"kind": "text_patches", **masks},
        {"kind": "correspondence", **masks},
        {"kind": "zero_shot", "name": "single_objects", "data": "single_objects", "limit": 500},
        {"kind": "retrieval", "data": "validation", "limit": 300},
    ]
    return parse_evaluators(tables, "the benchmark")


def main() -> None:
    """Train and measure every arm for every seed, and print its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=250.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["plain", "dense"])
    parser.add_argument("--work", type=Path, default=Path("runs/dense"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dense.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            folder = arguments.work / f"{arm}-{seed}-{arguments.seconds:g}s"
            run(arm, arguments.data, seed, arguments.seconds, folder)
            model, tokenizer, _ = load_folder(folder / "model")
            subject = EvaluatedModel(model.vision, model, tokenizer)
            row = {"arm": arm, "seed": seed, **read_json(folder / "benchmark.json")}
            for one, found in measure_all(evaluators(), subject, arguments.data):
                row |= {f"{one.title}/{name}": round(value, 4) for name, value in found.values.items()}
            append_lines(arguments.out, json_text(row) + "\n")
            print(json_text(row), flush=True)


if __name__ == "__main__":
    main()

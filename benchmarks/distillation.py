"""A small student with and without a teacher, for equal seconds of processor time on scenes.

    python benchmarks/distillation.py runs/quickstart/model runs/quickstart/scenes --seconds 60 --seeds 0 1 2

The teacher is the quickstart's model; the student has half its width and its three stages in one. How many samples a
run sees is set by its own speed, which the first steps measure, the teacher's forward pass included. Rows are added to
--out, one a run.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from openvision.files import append_lines, read_json_lines
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.training.trainer import Trainer
from openvision.untrusted import json_text

BATCH = 64
SPEED_STEPS = 8
VISION = {"width": 64, "depth": 3, "mlp_dim": 256, "heads": 1, "patch_size": 8, "image_size": 64}
TEXT = {"width": 128, "depth": 2, "mlp_dim": 512, "heads": 2, "vocab_size": 1024, "context_length": 24}
# Weights of the teacher's pooled vectors, patches and similarities.
ARMS: dict[str, dict[str, float] | None] = {
    "scratch": None,
    "pooled": {"pooled": 1.0},
    "similarity": {"pooled": 0.0, "similarity": 1.0},
    "all": {"pooled": 1.0, "patches": 1.0, "similarity": 1.0},
}
METRICS = ("top1", "top5", "t2i_r5", "sentence_t2i_r5")


def recipe_of(arm: str, teacher: Path, seed: int, steps: int) -> Recipe:
    """The student's recipe for `steps` updates."""
    weights = ARMS[arm]
    table = {} if weights is None else {"teacher": [{"source": str(teacher), "name": "teacher", **weights}]}
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
            "augment": {"crop_area": [0.8, 1.0], "jitter": 0.1, "grayscale_probability": 0},
            "data": {"train": "train", "validation": "validation", "tokenizer": str(teacher)},
            "stages": [stage | {"warmup_samples": samples // 10}],
            "run": {"log_every": 50, "evaluate_every": 10**9, "checkpoint_every": 10**9, "device": "cpu"},
            **table,
        },
        arm,
    )


def train(arm: str, teacher: Path, data: Path, seed: int, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds of processor time of the updates, and the validation's numbers."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe_of(arm, teacher, seed, steps), data, Path(folder) / "run")
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


def main() -> None:
    """Train every arm for every seed and print its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "distillation.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            few, many = (
                train(arm, arguments.teacher, arguments.data, seed, n)[0] for n in (SPEED_STEPS, 4 * SPEED_STEPS)
            )
            steps = max(SPEED_STEPS, int(arguments.seconds / (many - few) * 3 * SPEED_STEPS))
            seconds, numbers = train(arm, arguments.teacher, arguments.data, seed, steps)
            row = {"arm": arm, "seed": seed, "samples": steps * BATCH, "cpu_seconds": round(seconds, 1), **numbers}
            append_lines(arguments.out, json_text(row) + "\n")
            print(json_text(row), flush=True)


if __name__ == "__main__":
    main()

"""Train several recipes over several seeds on the same data and put their held-out results side by side.

    python benchmarks/compare_recipes.py recipes/quickstart.toml recipes/quickstart_clip.toml \
        --data runs/openmoji --runs runs/compare --seeds 0 1 2 -o benchmarks/results/recipe_against_clip.json

Each run is one `openvision train` and one `openvision eval` process, one after the other, so that nothing shares the
machine. A run that is finished is not repeated: the table can be made again from the folders.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

COLUMNS = ("top1", "top5", "t2i_r1", "t2i_r5", "t2i_r10")
SPLITS = ("heldout_compositional", "heldout_random")


def run_once(recipe: Path, seed: int, data: Path, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and evaluate one seed; return its numbers."""
    run = runs / f"{recipe.stem}-seed{seed}"
    if not (run / "evaluation.json").is_file():
        settings = [f"seed={seed}", *overrides]
        sets = [part for setting in settings for part in ("--set", setting)]
        openvision = [sys.executable, "-m", "openvision.cli.main"]
        subprocess.run([*openvision, "train", str(recipe), "--data", str(data), "--run", str(run), *sets], check=True)
        subprocess.run([*openvision, "eval", str(run), "--data", str(data)], check=True)
    evaluation = json.loads((run / "evaluation.json").read_text())
    provenance = json.loads((run / "model" / "provenance.json").read_text())
    numbers = {split: {name: evaluation["splits"][split]["model"][name] for name in COLUMNS} for split in SPLITS}
    return {
        "seed": seed,
        "seconds": provenance["training_seconds"],
        "samples": provenance["samples_seen"],
        "tflops": provenance["training_tflops"],
        **numbers,
    }


def summary(results: list[dict[str, Any]], split: str, column: str) -> str:
    """Mean and standard deviation over seeds, percent."""
    values = [100 * result[split][column] for result in results]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table, a row for each recipe and split."""
    head = ("recipe", "held-out set", "seeds", "samples", "seconds", *COLUMNS)
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, runs in results.items():
        seconds = statistics.mean(run["seconds"] for run in runs)
        for split in SPLITS:
            cells = [summary(runs, split, column) for column in COLUMNS]
            fixed = [name, split.removeprefix("heldout_"), str(len(runs)), str(runs[0]["samples"]), f"{seconds:.0f}"]
            rows.append("| " + " | ".join([*fixed, *cells]) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run everything and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    # Seeds outside, recipes inside: a machine that slows down slows all recipes alike.
    results: dict[str, list[dict[str, Any]]] = {recipe.stem: [] for recipe in arguments.recipes}
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            result = run_once(recipe, seed, arguments.data, arguments.runs, arguments.overrides)
            results[recipe.stem].append(result)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": sys.argv,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()

"""Train several recipes over several seeds on the same data and put their held-out results side by side.

    python benchmarks/compare_recipes.py recipes/quickstart_openmoji.toml recipes/quickstart_openmoji_clip.toml \
        --data runs/openmoji --runs runs/compare --seeds 0 1 2 -o benchmarks/results/recipe_against_clip.json

The recipes of a seed run at the same time, each on its share of the cores: whatever slows the machine slows all of them
alike, and equal wall-clock means equal compute time. A run that is finished is not repeated: the table can be made
again from the folders.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from openvision.evaluation.suites.held_out import MODEL, held_out_sets
from openvision.evaluation.suites.results import read_result as read_evaluation
from openvision.provenance import processor_name

COLUMNS = ("top1", "top5", "t2i_r1", "t2i_r5", "t2i_r10")
SPLITS = ("heldout_compositional", "heldout_random")


def command_of(recipe: Path, seed: int, data: Path, run: Path, overrides: list[str]) -> list[str]:
    """A shell-free command that trains and evaluates one seed of one recipe."""
    sets = [part for setting in (f"seed={seed}", *overrides) for part in ("--set", setting)]
    train = ["train", str(recipe), "--data", str(data), "--run", str(run), *sets]
    evaluate = ["eval", str(run), "--data", str(data)]
    script = (
        "import subprocess, sys; "
        "[subprocess.run([sys.executable, '-m', 'openvision.cli.main', *a], check=True) for a in {!r}]"
    )
    return [sys.executable, "-c", script.format([train, evaluate])]


def run_seed(recipes: list[Path], seed: int, data: Path, runs: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Train and evaluate every recipe with one seed, all at the same time with an equal share of the cores."""
    folders = [runs / f"{recipe.stem}-seed{seed}" for recipe in recipes]
    threads = str(max(1, (os.cpu_count() or 1) // len(recipes)))
    pending = [
        subprocess.Popen(
            command_of(recipe, seed, data, folder, overrides), env={**os.environ, "OMP_NUM_THREADS": threads}
        )
        for recipe, folder in zip(recipes, folders, strict=True)
        if not (folder / "evaluation.json").is_file()
    ]
    if any(process.wait() for process in pending):
        sys.exit("a run failed; run the same command again to go on")
    return [read_result(folder, seed) for folder in folders]


def read_result(run: Path, seed: int) -> dict[str, Any]:
    """Numbers of a finished run."""
    sets = {held_out.name: held_out.rows[MODEL] for held_out in held_out_sets(read_evaluation(run))}
    provenance = json.loads((run / "model" / "provenance.json").read_text())
    numbers = {split: {name: sets[split][name].value for name in COLUMNS} for split in SPLITS}
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
    mean = f"{statistics.mean(values):.1f}"
    # One run has no spread; "± 0.0" would say that it was measured.
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


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
    results: dict[str, list[dict[str, Any]]] = {recipe.stem: [] for recipe in arguments.recipes}
    for seed in arguments.seeds:
        finished = run_seed(arguments.recipes, seed, arguments.data, arguments.runs, arguments.overrides)
        for recipe, result in zip(arguments.recipes, finished, strict=True):
            results[recipe.stem].append(result)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": sys.argv,
        "machine": {"processor": processor_name(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()

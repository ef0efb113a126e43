"""Does joint training help or hurt? OpenVision 3 on scenes: all losses, understanding alone, reconstruction alone.

    openvision data scenes runs/scenes
    openvision autoencoder runs/scenes/train -o runs/autoencoder
    python benchmarks/openvision3_parts.py --data runs/scenes --runs runs/openvision3-parts --seeds 3

The parts are trained with weights of 0 for what they leave out, which is then measured and not trained: with
understanding alone the reconstruction decoder is only shrunk by weight decay. The reconstruction of each is printed
beside a constant colour: a loss that falls to that is no sign of synergy. Runs that are there are not trained again.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.evaluators.reconstruction import Reconstruction
from openvision.files import atomic_write_text, read_json_lines
from openvision.recipe.schema import load_recipe
from openvision.terminal import echo
from openvision.training.trainer import launch
from openvision.weights.load import load_checkpoint

RECIPE = Path(__file__).parents[1] / "recipes" / "openvision3" / "scenes.toml"
PARTS = {
    "joint": [],
    "understanding alone": ["loss.reconstruction.weight=0.0"],
    "reconstruction alone": ["loss.contrastive=0.0", "loss.caption=0.0"],
}
COLUMNS = ("psnr", "ssim", "l1", "latents_l1", "fd_efficientnet_lite0", "top1", "caption")
CONTROLS = ("constant", "autoencoder")


def measure(run: Path, data: Path, limit: int) -> dict[str, float]:
    """Reconstruction of the validation scenes, and the numbers of understanding from the log."""
    checkpoint = load_checkpoint(run / "model")
    model = EvaluatedModel(checkpoint.vision, checkpoint.unified, checkpoint.tokenizer)
    values = Reconstruction(data="validation", limit=limit).measure(model, data).values
    lines = read_json_lines(run / "metrics.jsonl")
    last = {kind: next(line for line in reversed(lines) if line["kind"] == kind) for kind in ("eval", "train")}
    return values | {"top1": last["eval"]["top1"], "caption": last["train"]["caption"]}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Means over seeds, with the deviation where there are several; the controls come from any run."""
    rows = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, runs in results.items():
        rows.append(f"| {name} | {' | '.join(_cell([run[column] for run in runs]) for column in COLUMNS)} |")
    first = next(iter(results.values()))[:1]
    for control in CONTROLS:
        cells = [_cell([run[f"{control}_{c}"] for run in first if f"{control}_{c}" in run]) for c in COLUMNS]
        rows.append(f"| {control} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def main() -> None:
    """Train what is missing, measure, print the table and write it beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=300, help="images that reconstruction is measured on")
    parser.add_argument("--set", action="append", default=[], help="override of the recipe, for every part")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for name, overrides in PARTS.items():
            run = arguments.runs / f"{name.replace(' ', '-')}-{seed}"
            if not (run / "model").is_dir():
                launch(load_recipe(RECIPE, [*overrides, f"seed={seed}", *arguments.set]), arguments.data, run)
            results.setdefault(name, []).append(measure(run, arguments.data, arguments.limit))
            atomic_write_text(arguments.runs / "results.json", json.dumps(results, indent=2) + "\n")
    echo(table(results))
    atomic_write_text(arguments.runs / "table.md", table(results) + "\n")


if __name__ == "__main__":
    main()

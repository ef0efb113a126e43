"""Speed-up by cached features of a frozen encoder: an epoch of LLaVA's second stage with and without.

    python benchmarks/vlm_feature_cache.py --llm SmolLM2-135M-Instruct.Q4_1.gguf \\
        -o benchmarks/results/vlm_feature_cache.json

Same model, order and images; encoders have random weights, which does not change the time. The time of a step is the
median over the epoch. "predicted" is the ratio of FLOPs with and without the encoder (`openvision/multimodal/cost.py`),
without the decoding and resizing of images that the cache also saves.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image

from openvision.models.variants import SIZES
from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.multimodal.cost import sample_cost
from openvision.multimodal.model.build import BuildOptions, assemble, save
from openvision.multimodal.model.geometry import Geometry
from openvision.multimodal.model.llm import load_llm
from openvision.multimodal.model.towers import tower_of
from openvision.multimodal.recipe import VlmRecipe, parse_vlm_recipe
from openvision.multimodal.training.run import train
from openvision.provenance import processor_name
from openvision.weights.load import Checkpoint

STAGES = {
    "full": {"learning_rate": {"projector": 2e-5, "llm": 2e-5}},
    "lora": {"learning_rate": {"projector": 2e-5, "llm": 2e-4}, "lora": {"rank": 16, "alpha": 32}},
    "projector": {"learning_rate": {"projector": 1e-3}},
}


def write_data(folder: Path, count: int, side: int = 336) -> None:
    """Write JPEG images of smooth noise, with a short question and answer about each."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        coarse = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side)).save(folder / "images" / f"{number}.jpg", quality=90)
        turns = [
            {"from": "human", "value": "<image>\nWhat is in this picture? Answer in a few words."},
            {"from": "gpt", "value": f"A blurred pattern of many colours, number {number} of a series of drawings."},
        ]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))


def recipe_of(kind: str, samples: int, batch: int, cached: bool) -> VlmRecipe:
    """One epoch that logs every step."""
    stage = {"name": "instruct", "conversations": "train.json", "images": "images", "batch_size": batch}
    run = {"micro_batch": batch, "log_every": 1, "cache_features": "always" if cached else "never"}
    content = {"name": "benchmark", "framework": "llava-1.5", "stages": [stage | STAGES[kind]], "run": run}
    return parse_vlm_recipe(content, "benchmark")


class Clock:
    """Records from the lines of a run when steps end and how long features took."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.features: list[tuple[float, int]] = []

    def __call__(self, line: str) -> None:
        """Record a line of the run."""
        print(f"    {line}", file=sys.stderr)
        now = time.perf_counter()
        if "starting" in line or "  step " in line:
            self.steps.append(now)
        elif "features of" in line:
            self.features.append((now, int(line.split("features of ")[1].split()[0])))

    @property
    def step_seconds(self) -> float:
        """Median without the first step, which warms up."""
        return statistics.median(np.diff(self.steps)[1:])

    @property
    def feature_seconds(self) -> float | None:
        """Seconds for one image, between the first and the last line about features."""
        if len(self.features) < 2:
            return None
        (first, few), (last, many) = self.features[0], self.features[-1]
        return (last - first) / (many - few)


@dataclass(frozen=True)
class BuiltModel:
    """A model on disk and its sizes."""

    folder: Path
    vision: VisionConfig
    geometry: Geometry
    parameters: int
    """Of the language model."""
    multiplied: int
    """Of those, the ones outside of its embeddings."""


class Row(TypedDict):
    """Results of an encoder in a kind of stage."""

    encoder: str
    trained: str
    llm_parameters: int
    visual_tokens: int
    text_tokens_about: int
    batch: int
    steps: int
    epoch_seconds_without: float
    epoch_seconds_with: float
    speedup: float
    predicted: float
    feature_seconds_a_picture: float | None
    feature_kilobytes_a_picture: float
    largest_loss_difference: float


@contextmanager
def model_around(size: str, patch: int, resolution: int, llm: Path) -> Iterator[BuiltModel]:
    """Build a model on disk around an encoder with random weights."""
    vision = VisionConfig(**SIZES[size].vision.sizes(), patch_size=patch, image_size=resolution)
    torch.manual_seed(0)
    checkpoint = Checkpoint(VisionTransformer(vision, None).eval(), None, None, "random", {})
    language = load_llm(llm)
    count = sum(parameter.numel() for parameter in language.model.parameters())
    table = language.model.get_input_embeddings().weight
    tied = language.model.get_output_embeddings().weight is table
    built = assemble(tower_of(checkpoint, check=False), language, BuildOptions())
    with tempfile.TemporaryDirectory() as folder:
        save(built, Path(folder), {}, BuildOptions())
        yield BuiltModel(Path(folder), vision, built.geometry, count, count - table.numel() * (1 if tied else 2))


def losses(run: Path) -> list[float]:
    """Loss of every step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(encoder: str, kind: str, llm: Path, samples: int, batch: int) -> Row:
    """One row: an encoder such as small/16/224 and a kind of stage."""
    size, patch, resolution = encoder.split("/")
    with model_around(size, int(patch), int(resolution), llm) as built:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_data(folder / "data", samples)
            clocks, found = {}, {}
            for name, cached in (("without", False), ("with", True)):
                clocks[name] = Clock()
                recipe = recipe_of(kind, samples, batch, cached)
                train(recipe, built.folder, folder / "data", folder / name, clocks[name])
                found[name] = losses(folder / name)
            stored = sum(file.stat().st_size for file in (folder / "with" / "features").rglob("*.safetensors"))
        text = 72
        cost = sample_cost(recipe.stages[0], built.vision, built.geometry, built.multiplied, text)
    steps = len(found["with"])
    seconds = {name: clock.step_seconds for name, clock in clocks.items()}
    differences = [abs(a - b) / abs(b) for a, b in zip(found["with"], found["without"], strict=True)]
    return {
        "encoder": encoder,
        "trained": kind,
        "llm_parameters": built.parameters,
        "visual_tokens": built.geometry.patches,
        "text_tokens_about": text,
        "batch": batch,
        "steps": steps,
        "epoch_seconds_without": seconds["without"] * steps,
        "epoch_seconds_with": seconds["with"] * steps,
        "speedup": seconds["without"] / seconds["with"],
        "predicted": cost.cached_speedup,
        "feature_seconds_a_picture": clocks["with"].feature_seconds,
        "feature_kilobytes_a_picture": stored / samples / 1000,
        "largest_loss_difference": max(differences),
    }


def table(rows: list[Row]) -> str:
    """Markdown table with one row for each encoder and kind of stage."""
    lines = [
        "| encoder | trained beside the projector | visual tokens | epoch without, s | with, s | speed-up | predicted "
        "| once for the features, s | kB an image | largest relative difference of a loss |",
        "|---|---|" + "---:|" * 8,
    ]
    beside = {"full": "whole language model", "lora": "LoRA in it", "projector": "nothing"}
    for row in rows:
        once = row["feature_seconds_a_picture"]
        cells = [
            row["encoder"],
            beside[row["trained"]],
            str(row["visual_tokens"]),
            f"{row['epoch_seconds_without']:.1f}",
            f"{row['epoch_seconds_with']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['predicted']:.2f}",
            f"{once * row['steps'] * row['batch']:.1f}" if once is not None else "-",
            f"{row['feature_kilobytes_a_picture']:.0f}",
            f"{row['largest_loss_difference']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every encoder and kind of stage, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", type=Path, required=True, help="folder or .gguf file")
    parser.add_argument("--encoders", nargs="+", default=["small/16/224", "base/16/224", "large/14/224"])
    parser.add_argument("--trained", nargs="+", default=["full", "lora"], choices=list(STAGES))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows = [
        compare(encoder, kind, arguments.llm, arguments.samples, arguments.batch)
        for encoder in arguments.encoders
        for kind in arguments.trained
    ]
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": sys.argv,
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "llm": {"name": arguments.llm.name, "parameters": rows[0]["llm_parameters"]},
        "results": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

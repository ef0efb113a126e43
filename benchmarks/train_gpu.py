"""Images a second, MFU and peak memory of whole training steps on one GPU, beside what `openvision plan` expects.

    python benchmarks/train_gpu.py -o benchmarks/results/train_gpu.json

The step is the trainer's own (forward, losses, backward, check, update) on random pictures and captions of 60 tokens on
average that already lie on the device: no loader. Every case has a process of its own, in which batch sizes are doubled
until memory ends; all of them are reported, so that models can be compared at equal batch. `--smoke` runs the same code
on shrunken models, on a CPU if need be: it proves that the script works and measures nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from openvision.data.loader import Batch
from openvision.hardware import GIB, model_flops_utilisation
from openvision.models.flops import training_flops
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import ModelConfig, OpenVision2, OpenVision2Config, build_model
from openvision.planning.memory import Setting, peak_bytes
from openvision.planning.parameters import count_parameters
from openvision.provenance import processor_name
from openvision.recipe.schema import Recipe, load_recipe
from openvision.runtime import SINGLE_PROCESS
from openvision.training.checkpoint.folders import Progress
from openvision.training.guards import DeferredGuard
from openvision.training.objective import build_objective
from openvision.training.optimizer import build_optimizer
from openvision.training.randomness import SampleRandomness
from openvision.training.run.throughput import peak_flops, peak_memory
from openvision.training.setup.compile import prepare_blocks
from openvision.training.setup.parallel import DistributedModel
from openvision.training.step import forward_backward
from openvision.training.update import apply_update, gradient_norm

RECIPES = Path(__file__).parents[1] / "recipes"
CASES = (
    ("openvision/l14", 84),
    ("openvision/l14", 224),
    ("openvision/b16", 224),
    ("openvision/so400m14", 224),
    ("openvision2/l14", 84),
    ("openvision2/l14", 224),
    ("openvision2/so400m14", 224),
)
CAPTION_TOKENS = (40, 80)
"""Shortest and longest caption; 60 on average."""
BOS = 1


@dataclass(frozen=True)
class Case:
    """One model at one resolution, and how it is run."""

    recipe: str
    resolution: int
    checkpointing: str
    compiled: bool
    batches: tuple[int, ...]
    steps: int
    device: str
    smoke: bool
    matmul: str
    """torch's float32 matrix products: "high" is TF32 on a GPU, "highest" is float32 to the last bit."""


def measure(case: Case) -> list[dict[str, Any]]:
    """A row for each batch size, until memory ends; run in a fresh process."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(case.matmul)
    recipe = load_recipe(RECIPES / f"{case.recipe}.toml")
    recipe = recipe.model_copy(update={"model": shrunken(recipe.model)}) if case.smoke else recipe
    resolution = 2 * recipe.model.vision.patch_size if case.smoke else case.resolution
    device = torch.device(case.device)
    _, step = build_step(recipe, case, device)
    rows: list[dict[str, Any]] = []
    for size in case.batches:
        try:
            row = time_steps(step, recipe, size, resolution, case.steps, device)
        except torch.OutOfMemoryError:
            print(f"{case.recipe} at {resolution} px: batch {size} does not fit", file=sys.stderr)
            break
        rows.append({"recipe": case.recipe, "resolution": resolution, **vars_of(case), **row})
    return rows


def vars_of(case: Case) -> dict[str, Any]:
    """What a row says about how it was run."""
    return {"checkpointing": case.checkpointing, "compiled": case.compiled, "matmul": case.matmul}


def shrunken(config: ModelConfig) -> ModelConfig:
    """The same model with towers of two narrow blocks and few words."""
    small: dict[str, Any] = {"width": 64, "depth": 2, "mlp_dim": 128, "heads": 2}
    towers: dict[str, Any] = {"vision": replace(config.vision, **small)}
    if config.decoder is not None:
        towers["decoder"] = replace(config.decoder, **small, vocab_size=256)
    if not isinstance(config, OpenVision2Config):
        towers["text"] = replace(config.text, **small, vocab_size=256)
    return replace(config, **towers)


def build_step(
    recipe: Recipe, case: Case, device: torch.device
) -> tuple[OpenVision | OpenVision2, Callable[[Batch], None]]:
    """A new model and the computation of the trainer's step on it, in bf16."""
    model = build_model(recipe.model).to(device).train()
    prepare_blocks(model, case.checkpointing, case.compiled)  # pyright: ignore[reportArgumentType]
    optimizer, distributed = build_optimizer(model, recipe.optimizer), DistributedModel(model)
    objective = build_objective(distributed, recipe.loss, BOS)
    progress = Progress()
    guard = DeferredGuard(recipe.guards, progress, replace(SINGLE_PROCESS, device=device))

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        randomness = SampleRandomness(recipe.seed, batch.positions.cpu().numpy())
        losses = forward_backward(distributed, objective, batch, randomness, torch.bfloat16)
        norm = gradient_norm(optimizer)
        # As on an accelerator: the device selects the update, the host hears of a loss that is not finite later.
        guard.learn()
        apply_update(optimizer, 1e-5, norm, selected=guard.select(losses, norm))
        progress.step += 1

    return model, step


def time_steps(
    step: Callable[[Batch], None], recipe: Recipe, size: int, resolution: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Median time of `steps` steps after three that do not count, and what follows from it."""
    batch = random_batch(recipe, size, resolution, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [one_step(step, batch, device) for _ in range(3 + steps)][3:]
    rate = size / statistics.median(seconds)
    texts = len(recipe.loss.texts)
    flops = training_flops(recipe.model, resolution, texts, batch.label_mask.sum().item() / size)
    peak, setting = peak_flops(device), Setting(gpu=device.type == "cuda")
    expected = peak_bytes(recipe.model, count_parameters(recipe.model), resolution, texts, setting, size, size)
    return {
        "batch": size,
        "images_per_second": rate,
        "step_seconds": seconds,
        "training_gflop_a_sample": flops / 1e9,
        "tflop_per_second": rate * flops / 1e12,
        "mfu": None if peak is None else model_flops_utilisation(flops, rate, peak),
        "peak_gib": peak_memory(device) / GIB,
        "planned_gib_without_checkpointing": [end / GIB for end in expected],
    }


def one_step(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    """Seconds of a step, to the end of its work on the device."""
    start = time.perf_counter()
    step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def random_batch(recipe: Recipe, size: int, resolution: int, device: torch.device) -> Batch:
    """Noise for images, random ids for texts, captions of 40 to 80 tokens; all but the targets' mask on the device."""
    decoder, vocabulary = recipe.model.decoder, recipe.vocab_size
    context, caption = recipe.context_length or 0, decoder.caption_length if decoder else 0

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, (size, length), device=device)

    lengths = torch.linspace(*CAPTION_TOKENS, size).round().clamp(max=caption)
    return Batch(
        images=torch.randint(0, 256, (size, 3, resolution, resolution), dtype=torch.uint8, device=device),
        alt_ids=ids(context),
        sentence_ids=ids(context),
        labels=ids(caption),
        label_mask=torch.arange(caption) < lengths[:, None],
        positions=torch.arange(size),
        keys=[""] * size,
        rejects=(),
        texts_cut=0,
        captions_missing=0,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the fastest batch of every case, and its speed over version 1 at the same size and resolution."""
    head = [
        "recipe",
        "px",
        "checkpointing",
        "compiled",
        "batch",
        "images/s",
        "MFU",
        "peak GiB",
        "planned GiB",
        "over v1",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in best_of(rows):
        low, high = row["planned_gib_without_checkpointing"]
        planned = f"{low:.1f} to {high:.1f}" if row["checkpointing"] == "none" else ""
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        cells = [row["recipe"], row["resolution"], row["checkpointing"], "yes" if row["compiled"] else "no"]
        cells += [row["batch"], f"{row['images_per_second']:.0f}", mfu, f"{row['peak_gib']:.2f}", planned]
        lines.append("| " + " | ".join(map(str, [*cells, over_first(row, rows)])) + " |")
    return "\n".join(lines)


def best_of(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The fastest row of each model, resolution and way of running."""
    keys = ("recipe", "resolution", "checkpointing", "compiled")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for group in groups.values():
        yield max(group, key=lambda row: row["images_per_second"])


def over_first(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Speed of OpenVision 2 over the fastest of version 1."""
    if not row["recipe"].startswith("openvision2/"):
        return ""
    twin = row["recipe"].replace("openvision2/", "openvision/")
    firsts = [r for r in rows if r["recipe"] == twin and r["resolution"] == row["resolution"]]
    if not firsts:
        return ""
    return f"{row['images_per_second'] / max(first['images_per_second'] for first in firsts):.2f}x"


def in_own_process(case: Case) -> list[dict[str, Any]]:
    """Run `measure` in a fresh interpreter: no case inherits memory or compiled code."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(vars(case))], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every case and write JSON and Markdown as they come."""
    arguments = parse()
    if arguments.one:
        given = json.loads(arguments.one)
        print(json.dumps(measure(Case(**given | {"batches": tuple(given["batches"])}))))
        return
    if arguments.device == "cpu" and not arguments.smoke:
        sys.exit("no GPU: this benchmark needs one; try --smoke")
    rows: list[dict[str, Any]] = []
    for recipe, resolution in CASES:
        if arguments.only and recipe not in arguments.only:
            continue
        for checkpointing in arguments.checkpointing:
            case = Case(
                recipe,
                resolution,
                checkpointing,
                arguments.compile and not arguments.smoke,
                (2, 4) if arguments.smoke else tuple(arguments.batches),
                1 if arguments.smoke else arguments.steps,
                arguments.device,
                arguments.smoke,
                arguments.matmul,
            )
            rows += in_own_process(case)
            if arguments.output:
                write(arguments, rows)
    print(table(rows))


def parse() -> argparse.Namespace:
    """The command line."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted({recipe for recipe, _ in CASES}))
    parser.add_argument("--batches", nargs="+", type=int, default=[2**power for power in range(4, 13)])
    parser.add_argument("--checkpointing", nargs="+", default=["none", "selective"])
    parser.add_argument("--steps", type=int, default=10, help="that count, for each batch size")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--matmul", choices=["high", "highest"], default="high", help="float32 products: TF32 or exact")
    parser.add_argument("--device", default=found)
    parser.add_argument("--smoke", action="store_true", help="shrunken models, two batch sizes, no compiler")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write what has been measured so far as JSON and Markdown."""
    accelerator = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else None
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": sys.argv,
        "smoke": arguments.smoke,
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "accelerator": accelerator},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "results": rows,
    }
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    output.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()

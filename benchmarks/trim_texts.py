"""Processor time of a training step with texts trimmed (`run.trim_texts`) and whole, in turns in one process.

    .venv/bin/python benchmarks/trim_texts.py --data SCENES/train --tokenizer RUN/tokenizer \\
        -o benchmarks/results/trim_texts.json

The model, stage, optimizer and batches of recipes/quickstart.toml, on composed scenes; beside them the same with a
caption decoder that leaves padding out, without a decoder, and with a text tower that reads up to 512 ids. Forward,
backward and update on one thread; a number is the median of the turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from openvision.data.batch import Batch
from openvision.data.loader import InputSpec, Loader
from openvision.data.shards.dataset import ShardDataset
from openvision.models.openvision2 import build_model
from openvision.provenance import processor_name
from openvision.recipe.schema import Recipe, load_recipe
from openvision.text.tokenizer import Tokenizer
from openvision.training.objective import build_objective
from openvision.training.optimizer.build import build_optimizer
from openvision.training.optimizer.update import apply_update, gradient_norm
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.parallel import DistributedModel
from openvision.training.step import forward_backward

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
# Overrides of the recipe, and samples of a batch.
CASES: dict[str, tuple[list[str], int]] = {
    "quickstart": ([], 128),
    "decoder leaves padding out": (["model.decoder.reads_padding=false"], 128),
    "no decoder": (["model.decoder=none", "loss.caption=0"], 128),
    "context of 512": (["model.text.context_length=512", "model.decoder.reads_padding=false"], 16),
}
BATCHES = 4


def batches_of(recipe: Recipe, data: Path, tokenizer: Tokenizer, size: int) -> list[Batch]:
    """A few batches of the last stage, with the lengths of their texts."""
    inputs = InputSpec(
        recipe.stages[-1].resolution, recipe.context_length, recipe.caption_length, recipe.augment, text_lengths=True
    )
    dataset = ShardDataset(data, synthetic_key=recipe.data.synthetic_key, alt_key=recipe.data.alt_key)
    with Loader(dataset, tokenizer, inputs, batch_size=size, seed=0) as loader:
        return [next(loader) for _ in range(BATCHES)]


def step_of(recipe: Recipe, tokenizer: Tokenizer) -> Callable[[Batch], float]:
    """Forward, backward and update of a new model; returns the loss."""
    torch.manual_seed(0)
    model = DistributedModel(build_model(recipe.model).train())
    optimizer = build_optimizer(model.module, recipe.optimizer)
    objective = build_objective(model, recipe.loss, tokenizer.bos_id)

    def step(batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        losses = forward_backward(model, objective, batch, SampleRandomness(0, batch.positions.numpy()))
        apply_update(optimizer, 1e-4, gradient_norm(optimizer))
        return losses.values()["loss"]

    return step


def measure(name: str, data: Path, tokenizer: Tokenizer, turns: int) -> dict[str, Any]:
    """One row: seconds of a step, whole and trimmed."""
    overrides, size = CASES[name]
    recipe = load_recipe(RECIPE, overrides)
    trimmed = batches_of(recipe, data, tokenizer, size)
    lengths = torch.cat([batch.text_lengths for batch in trimmed if batch.text_lengths is not None])
    whole = [replace(batch, text_lengths=None) for batch in trimmed]
    sides = {"whole": (step_of(recipe, tokenizer), whole), "trimmed": (step_of(recipe, tokenizer), trimmed)}
    first = {side: step(batches[0]) for side, (step, batches) in sides.items()}
    assert abs(first["whole"] - first["trimmed"]) < 1e-4, f"not the same loss: {first}"
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(turns):
        for side, (step, batches) in sides.items():
            start = time.process_time()
            step(batches[turn % BATCHES])
            times[side].append(time.process_time() - start)
    seconds = {side: round(statistics.median(values), 4) for side, values in times.items()}
    return {
        "case": name,
        "batch": size,
        "context_length": recipe.context_length,
        "ids_of_a_text": round(lengths.double().mean().item() + 1, 2),
        "seconds": seconds,
        "saved": round(1 - seconds["trimmed"] / seconds["whole"], 3),
        "turns": turns,
    }


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of training shards of scenes")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer of a run on them")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(options.tokenizer)
    rows = []
    for name in CASES:
        rows.append(measure(name, options.data, tokenizer, options.turns))
        print(rows[-1], flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor_name(),
        "torch": torch.__version__,
        "threads": 1,
        "rows": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

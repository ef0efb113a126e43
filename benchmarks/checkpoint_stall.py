"""How long saving keeps a training run waiting.

    python benchmarks/checkpoint_stall.py [--size small] [--resolution 160] [--batch 16] [--saves 4] [-o result.json]

A model of the given size, with text tower and caption decoder, takes steps on random batches; after every few its
state is saved as a run saves it. The stall of a save is what the training thread waits for (the copy of the state), and
what the steps that run beside the writing thread take longer than the median of those before them. The share printed
is that stall at one save a minute.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from openvision.data.batch import Batch
from openvision.models.openvision import OpenVision
from openvision.models.variants import variant
from openvision.provenance import processor_name
from openvision.recipe.sections import Loss, Optimizer
from openvision.runtime import resolve_precision
from openvision.training.checkpoint.folders import Progress, checkpoints, read_manifest
from openvision.training.checkpoint.manager import Checkpoints
from openvision.training.objective import ImageTextObjective
from openvision.training.optimizer.build import build_optimizer
from openvision.training.optimizer.update import apply_update, gradient_norm
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.parallel import DistributedModel
from openvision.training.step import forward_backward


def random_batch(model: OpenVision, size: int, resolution: int) -> Batch:
    """A batch of noise with texts of full length."""
    text, decoder = model.config.text, model.config.decoder
    assert decoder is not None
    ids = [torch.randint(0, text.vocab_size, (size, text.context_length)) for _ in range(2)]
    return Batch(
        images=torch.randint(0, 256, (size, 3, resolution, resolution), dtype=torch.uint8),
        alt_ids=ids[0],
        sentence_ids=ids[1],
        labels=torch.randint(0, decoder.vocab_size, (size, decoder.caption_length)),
        label_mask=torch.ones(size, decoder.caption_length, dtype=torch.bool),
        positions=torch.arange(size),
        keys=[""] * size,
        rejects=(),
        texts_cut=0,
        captions_missing=0,
    )


def measure(size: str, resolution: int, batch_size: int, saves: int, quiet_steps: int, folder: Path) -> dict[str, Any]:
    """Take `quiet_steps` steps, save, step until everything is written; `saves` times."""
    torch.manual_seed(0)
    model = OpenVision(variant(size, 16, resolution)).train()
    optimizer = build_optimizer(model, Optimizer())
    distributed, objective = DistributedModel(model), ImageTextObjective(model, Loss())
    precision = resolve_precision("auto", torch.device("cpu"))
    batch = random_batch(model, batch_size, resolution)
    store = Checkpoints(folder)

    def timed_step() -> float:
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        forward_backward(distributed, objective, batch, SampleRandomness(0, batch.positions.numpy()), precision)
        apply_update(optimizer, 1e-5, gradient_norm(optimizer))
        return time.perf_counter() - begin

    rounds = []
    for number in range(saves + 1):
        quiet = [timed_step() for _ in range(quiet_steps)]
        begin = time.perf_counter()
        store.save(model, optimizer, Progress(step=number + 1))
        copied = time.perf_counter()
        beside = []
        while store.writing:
            beside.append(timed_step())
        median = statistics.median(quiet)
        extra = sum(beside) - median * len(beside)
        row = {"copy": copied - begin, "written_after": time.perf_counter() - begin, "step": median, "extra": extra}
        row |= {"steps_beside": len(beside), "stall": row["copy"] + extra, "spread": max(quiet) - min(quiet)}
        print({key: round(value, 3) for key, value in row.items()}, "(warm-up)" if not number else "", flush=True)
        rounds.append(row)
    store.close()
    # The first save imports what saving needs and takes memory for the copy.
    later = rounds[1:]
    stall = statistics.median(row["stall"] for row in later)
    return {
        "model": f"{size} patch 16 at {resolution} px, batch {batch_size}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "checkpoint_bytes": sum(file["bytes"] for file in read_manifest(checkpoints(folder)[-1]).values()),
        "rounds": rounds,
        "copy_seconds": statistics.median(row["copy"] for row in later),
        "stall_seconds": stall,
        "stall_share_at_one_save_a_minute": stall / 60,
        "first_save_stall_seconds": rounds[0]["stall"],
    }


def main() -> None:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--resolution", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--quiet-steps", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            arguments.size,
            arguments.resolution,
            arguments.batch,
            arguments.saves,
            arguments.quiet_steps,
            Path(folder),
        )
    result |= {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

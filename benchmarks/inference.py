"""Images a second of a vision tower on this CPU: ours, ONNX Runtime, stock timm and stock open_clip, side by side.

    .venv-oracle/bin/python benchmarks/inference.py -o benchmarks/results/inference.json

All are the same tower with the same random weights, float32 but for int8, and give the pooled embedding. Every shape
and thread count has a process of its own, in which the candidates take turns, so that whatever slows the machine slows
all of them alike; a number is the median of the turns. Needs timm and open_clip: `make test` builds that environment.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision_operators as torchvision_operators

from openvision.errors import require
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.variants import variant
from openvision.provenance import processor_name
from openvision.weights.export.onnx import open_session
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.load import Checkpoint

BASELINE = "open_clip eager"
Candidate = Callable[[torch.Tensor], Any]


def checkpoint_of(size: str, resolution: int) -> Checkpoint:
    """The released shape at patch 16 with random weights; the text tower, which nothing here runs, is kept small."""
    full = variant(size, 16, resolution)
    text = replace(full.text, depth=1, vocab_size=500)
    torch.manual_seed(0)
    model = OpenVision(OpenVisionConfig(full.embed_dim, full.vision, text)).eval()
    return Checkpoint(model.vision, model, None, size, {})


def candidates(size: str, resolution: int, threads: int, folder: Path, compiled: bool) -> dict[str, Candidate]:
    """Every way to run the same tower, by name: images (B, 3, R, R) -> embedding."""
    open_clip, timm = require("open_clip", extra="open_clip"), require("timm", extra="timm")
    checkpoint = checkpoint_of(size, resolution)
    vision = checkpoint.vision
    unchecked = ExportOptions(check=False)
    for target, options in (
        ("open_clip", unchecked),
        ("timm", unchecked),
        ("onnx", unchecked),
        ("int8", ExportOptions(check=False, precision="int8")),
    ):
        export(checkpoint, "onnx" if target == "int8" else target, folder / target, options)
    theirs = open_clip.create_model(f"local-dir:{folder / 'open_clip'}").eval()
    stock = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    # The towers alone: no session computes the text, and no graph is asked for patch tokens.
    runs: dict[str, Candidate] = {
        BASELINE: theirs.visual,
        "timm eager": stock,
        "ours eager": vision,
        "ONNX Runtime fp32": _session(folder / "onnx", threads),
        "ONNX Runtime int8": _session(folder / "int8", threads),
    }
    if compiled:
        runs["ours compiled"] = torch.compile(vision)  # pyright: ignore[reportArgumentType]
    return runs


def _session(folder: Path, threads: int) -> Candidate:
    session = open_session(folder / "vision.onnx", threads)
    return lambda images: session.run(["image_embeds"], {"images": images.numpy()})


def measure(size: str, resolution: int, threads: int, batches: list[int], seconds: float, compiled: bool) -> list[dict]:
    """Images a second of every candidate at every batch size; run in a process with `threads` threads."""
    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        runs = candidates(size, resolution, threads, Path(folder), compiled)
        for batch in batches:
            images = torch.randn(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
            for run in runs.values():
                run(images)
            rates = _take_turns(runs, images, seconds)
            shape = {"size": size, "resolution": resolution, "threads": threads, "batch": batch}
            rows.append(shape | {"images_per_second": rates})
    return rows


def _take_turns(runs: dict[str, Candidate], images: torch.Tensor, seconds: float) -> dict[str, float]:
    """Median rate of each candidate over three turns or more, until all have had `seconds` each on average."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or len(times[BASELINE]) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run(images)
            times[name].append(time.perf_counter() - start)
    return {name: len(images) / statistics.median(values) for name, values in times.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: images a second of open_clip, and how many times that the others reach."""
    names = list(dict.fromkeys(name for row in rows for name in row["images_per_second"] if name != BASELINE))
    head = ["model", "px", "threads", "batch", f"{BASELINE}, images/s", *names]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        rates = row["images_per_second"]
        base = rates[BASELINE]
        ratios = [f"{rates[name] / base:.2f}x" if name in rates else "" for name in names]
        shape = [f"{row['size']}/16", str(row["resolution"]), str(row["threads"]), str(row["batch"])]
        lines.append("| " + " | ".join([*shape, f"{base:.1f}", *ratios]) + " |")
    return "\n".join(lines)


def in_own_process(arguments: argparse.Namespace, size: str, resolution: int, threads: int) -> list[dict[str, Any]]:
    """Run `measure` in a fresh interpreter, whose OpenMP has just that many threads."""
    command = [sys.executable, __file__, "--one", size, str(resolution), str(threads)]
    command += ["--batches", *map(str, arguments.batches), "--seconds", str(arguments.seconds)]
    command += [] if arguments.compile else ["--no-compile"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every shape and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[160, 224])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate, on average")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        size, resolution, threads = arguments.one[0], int(arguments.one[1]), int(arguments.one[2])
        print(json.dumps(measure(size, resolution, threads, arguments.batches, arguments.seconds, arguments.compile)))
        return
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for resolution in arguments.resolutions:
            for threads in arguments.threads:
                rows += in_own_process(arguments, size, resolution, threads)
                print("\n".join(table(rows).splitlines()[-len(arguments.batches) :]), file=sys.stderr, flush=True)
                if arguments.output:
                    write(arguments.output, rows)
    print(table(rows))


def write(output: Path, rows: list[dict[str, Any]]) -> None:
    """Write what has been measured so far as JSON and Markdown."""
    packages = ("torch", "onnxruntime", "timm", "open_clip_torch", "transformers")
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": sys.argv,
        "machine": {"processor": processor_name(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in packages},
        "results": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    output.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()

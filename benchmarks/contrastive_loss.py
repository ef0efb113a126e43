"""Time and peak memory of the contrastive loss, forward and backward: ours in chunks beside open_clip's `ClipLoss`.

    .venv-oracle/bin/python benchmarks/contrastive_loss.py -o benchmarks/results/contrastive_loss.json

Float32 on the CPU. Each measurement has a process of its own, and the sides take turns; a number is the median of the
turns. Peak memory is the process's highest less what it held before the loss, and so includes the gradients of the
features. Losses and gradients of the sides are compared. At batch 32,768 open_clip's formulation needs 16.3 GiB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision_operators as torchvision_operators

from openvision.errors import require
from openvision.objectives.contrastive import CHUNK_LOGITS, info_nce
from openvision.provenance import processor_name

SIDES = ("open_clip", "ours")
MIB = 2**20


def loss_of(side: str, chunk: int) -> Callable[..., torch.Tensor]:
    """(images, texts, scale) -> scalar."""
    if side == "ours":
        return partial(info_nce, chunk=chunk)
    return require("open_clip", extra="open_clip").ClipLoss()


def measure(side: str, batch: int, width: int, chunk: int) -> dict[str, float]:
    """Seconds and bytes of one forward and backward in this process, with what it computed."""
    loss = loss_of(side, chunk)
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(batch, width, generator=generator), dim=1).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    # Threads are started and kernels chosen by a small batch, in both forms.
    loss(images[:64], texts[:64], scale).backward()
    info_nce(images[:64], texts[:64], scale, chunk=1024).backward()
    images.grad = texts.grad = scale.grad = None
    before = _status_bytes("VmRSS")
    start = time.perf_counter()
    value = loss(images, texts, scale)
    value.backward()
    seconds = time.perf_counter() - start
    peak = _status_bytes("VmHWM") - before
    assert images.grad is not None
    assert texts.grad is not None
    assert scale.grad is not None
    norms = {"images": images.grad.norm().item(), "texts": texts.grad.norm().item(), "scale": scale.grad.item()}
    return {"seconds": seconds, "peak_bytes": peak, "loss": value.item(), **norms}


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def available_bytes() -> int:
    """Memory that the system can give without swapping."""
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def in_own_process(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh interpreter with so many threads."""
    command = [sys.executable, __file__, "--one", side, "--batch", str(arguments.batch)]
    command += ["--width", str(arguments.width), "--chunk", str(arguments.chunk)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(turns: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Median of each figure; refuses sides that do not compute the same."""
    median = {
        side: {key: statistics.median(turn[key] for turn in found) for key in found[0]} for side, found in turns.items()
    }
    for key in ("loss", "images", "texts", "scale"):
        theirs, ours = (median[side][key] for side in SIDES)
        if abs(ours - theirs) > 1e-5 * abs(theirs):
            raise SystemExit(f"the sides differ: {key} is {theirs} by open_clip and {ours} by ours")
    return median


def table(report: dict[str, Any]) -> str:
    """Markdown: both sides, the ratios, and what they were measured with."""
    median = report["median"]
    lines = ["| side | time, s | peak memory, MiB |", "|---|---:|---:|"]
    lines += [f"| {side} | {median[side]['seconds']:.2f} | {median[side]['peak_bytes'] / MIB:.0f} |" for side in SIDES]
    theirs, ours = (median[side] for side in SIDES)
    share = theirs["peak_bytes"] / ours["peak_bytes"]
    lines.append(f"| ours / open_clip | {ours['seconds'] / theirs['seconds']:.2f}x | 1/{share:.1f} |")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    machine = report["machine"]
    lines += [
        "",
        f"Forward and backward, float32, batch {report['batch']:,}, dimension {report['width']}, "
        f"{report['chunk']:,} logits a chunk, median of {report['repeat']}.",
        f"{report['date']}, {machine['processor']}, {machine['threads']} of {machine['cores']} cores, {versions}.",
        f"`{' '.join(report['command'])}`",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure both sides in turns and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=CHUNK_LOGITS, help="logits of ours held at a time")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.batch, arguments.width, arguments.chunk)))
        return
    # Four matrices of logits at the worst moment, and a little.
    needed = 17 * arguments.batch**2
    if needed > available_bytes():
        raise SystemExit(
            f"open_clip's loss at batch {arguments.batch:,} needs {needed / 2**30:.1f} GiB, and "
            f"{available_bytes() / 2**30:.1f} GiB are available: give a smaller --batch"
        )
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.repeat):
        for side, found in turns.items():
            found.append(in_own_process(side, arguments))
            print(
                f"{side}: {found[-1]['seconds']:.2f} s, {found[-1]['peak_bytes'] / MIB:.0f} MiB",
                file=sys.stderr,
                flush=True,
            )
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": ["python", *sys.argv],
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "threads": arguments.threads},
        "versions": {name: version(name) for name in ("torch", "open_clip_torch")},
        "batch": arguments.batch,
        "width": arguments.width,
        "chunk": arguments.chunk,
        "repeat": arguments.repeat,
        "turns": turns,
        "median": summary(turns),
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()

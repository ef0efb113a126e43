"""Latency of every kind of export of one tower, side by side, by `openvision bench`'s own measure.

    .venv-oracle/bin/python benchmarks/exports.py -o benchmarks/results/exports.json

Random weights in a released shape at patch 16; one thread. All folders take turns in every round, so that whatever
slows the machine slows all of them alike; "speed" is the median over rounds of open_clip's time over the export's.
Static int8 is calibrated on noise here: its speed does not depend on the images. Needs timm and open_clip, as
`make test` installs them. On a busy machine `taskset -c 1 chrt -r 1` before the command keeps a core for it, as root.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision_operators as torchvision_operators
from inference import checkpoint_of

from openvision.inference.latency import measure_latency
from openvision.provenance import git_state, processor_name
from openvision.weights.export.targets import ExportOptions, export

PIXELS = 224
NOISE = torch.randint(0, 256, (8, 3, PIXELS, PIXELS), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
KINDS: dict[str, tuple[str, ExportOptions]] = {
    "open_clip": ("open_clip", ExportOptions(check=False)),
    "timm": ("timm", ExportOptions(check=False)),
    "transformers": ("transformers", ExportOptions(check=False)),
    "this project": ("safetensors", ExportOptions(check=False)),
    "ONNX fp32": ("onnx", ExportOptions(check=False)),
    "ONNX int8": ("onnx", ExportOptions(check=False, precision="int8")),
    "ONNX int8, calibrated": ("onnx", ExportOptions(check=False, precision="int8", calibration=NOISE)),
}


def measure(size: str, batches: list[int], runs: int, folder: Path) -> list[dict[str, Any]]:
    """A row a kind and batch size."""
    checkpoint, folders = checkpoint_of(size, PIXELS), [folder / kind for kind in KINDS]
    for path, (target, options) in zip(folders, KINDS.values(), strict=True):
        # A model folder of ours holds a tokenizer, which random weights do not have: the vision tower alone.
        model = checkpoint if target != "safetensors" else checkpoint.__class__(checkpoint.vision, None, None, size, {})
        export(model, target, path, options)
    rows = []
    for batch in batches:
        for kind, found in zip(KINDS, measure_latency(folders, batch, runs, threads=1), strict=True):
            rows.append(asdict(found) | {"folder": kind, "size": size})
            print(f"{size} {batch} {kind}: {1000 * found.p50:.1f} ms, {found.speed:.2f}x", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds and speed of each kind, a column a shape and batch."""
    shapes = list(dict.fromkeys((row["size"], row["batch"]) for row in rows))
    names = [f"{size}/16, batch {batch}" for size, batch in shapes]
    lines = ["| export | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    found = {(row["folder"], row["size"], row["batch"]): row for row in rows}
    for kind in KINDS:
        cells = []
        for shape in shapes:
            row = found[(kind, *shape)]
            cells.append(f"{1000 * row['p50']:.1f} ms, {row['speed']:.2f}x")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def source(report: dict[str, Any]) -> str:
    """What was measured, on what, and how."""
    machine, versions = report["machine"], ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    core = " with a core of its own (real-time priority)" if machine["real_time"] else ""
    return f"""{report["date"]}, one thread of {machine["processor"]}{core}, load {machine["load"]:.0f} for
{machine["cores"]} cores; {versions}; `{report["command"]}`.
Milliseconds are medians; "x" is the median over rounds of open_clip's time over the export's."""


def main() -> None:
    """Export, measure and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(size, arguments.batches, arguments.runs, Path(folder))
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/exports.py", *sys.argv[1:]]),
        "git": git_state(),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "real_time": os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO),
        },
        "versions": {
            name: version(name) for name in ("torch", "onnxruntime", "timm", "open_clip_torch", "transformers")
        },
        "results": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(f"{table(rows)}\n\n{source(report)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()

"""Time and peak memory of loading a whole L/14 from each kind of file, beside reading the file plainly.

    python benchmarks/loading.py -o benchmarks/results/loading.json

Each measurement has a process of its own. "plain" is `safetensors.torch.load_file` and reading every byte once; after
loading, every parameter is read once as well. Peak memory is what the process grew by since its imports, over the size
of the file. The file is in the page cache in all of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from openvision.models.openvision import OpenVision
from openvision.models.variants import variant
from openvision.provenance import processor_name
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from openvision.weights.jax import to_jax
from openvision.weights.load import Request, load_checkpoint
from openvision.weights.open_clip import to_open_clip


def write_files(folder: Path, size: str) -> dict[str, Path]:
    """A model of random weights in every form; the file each kind reads."""
    patch = 16 if size in ("tiny", "small", "base") else 14
    model = OpenVision(variant(size, patch, 224)).eval()
    save_folder(folder / "ours", model, Tokenizer.train(["a dog", "a cat"], 50), "", {})
    released = {name: tensor.contiguous() for name, tensor in to_open_clip(model.state_dict(), model.config).items()}
    torch.save(released, folder / "open_clip.bin")
    save_file(released, folder / "open_clip.safetensors")
    np.savez(folder / "tree.npz", **to_jax(model.state_dict()))  # pyright: ignore[reportArgumentType]
    own = folder / "ours" / "model.safetensors"
    return {
        "plain": own,
        "safetensors": own,
        "open_clip bin": folder / "open_clip.bin",
        "open_clip safetensors": folder / "open_clip.safetensors",
        "jax npz": folder / "tree.npz",
    }


def measure(kind: str, path: Path) -> dict[str, float]:
    """Load, read every byte, and say how long it took and how much memory it needed, in this process."""
    before = _peak_bytes()
    start = time.perf_counter()
    if kind == "plain":
        tensors = list(load_file(path).values())
    else:
        model = load_checkpoint(path, Request(image_size=224)).model
        assert model is not None
        tensors = list(model.parameters())
    loaded = time.perf_counter()
    total = sum(float(tensor.detach().sum()) for tensor in tensors)
    assert np.isfinite(total)
    done = time.perf_counter()
    return {"load_s": loaded - start, "with_reading_s": done - start, "peak_bytes": _peak_bytes() - before}


def _peak_bytes() -> int:
    # Not getrusage: what it tells includes the parent's peak from before exec.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_own_process(kind: str, path: Path) -> dict[str, float]:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, __file__, "--one", kind, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a kind of file."""
    plain = next(row for row in rows if row["kind"] == "plain")["with_reading_s"]
    lines = ["| source | file, GB | load, s | load and read, s | over plain | peak memory over file |"]
    lines.append("|---|" + "---:|" * 5)
    for row in rows:
        cells = [f"{row['file_bytes'] / 1e9:.2f}", f"{row['load_s']:.2f}", f"{row['with_reading_s']:.2f}"]
        cells += [f"{row['with_reading_s'] / plain:.2f}x", f"{row['peak_bytes'] / row['file_bytes']:.2f}x"]
        lines.append("| " + " | ".join([row["kind"], *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every kind, best of three, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], Path(arguments.one[1]))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, path in write_files(Path(folder), arguments.size).items():
            tries = [in_own_process(kind, path) for _ in range(3)]
            best = min(tries, key=lambda result: result["with_reading_s"])
            rows.append({"kind": kind, "file_bytes": path.stat().st_size, **best})
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": sys.argv,
        "machine": {"processor": processor_name(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "results": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

"""What lower precision in ONNX Runtime costs in zero-shot accuracy: an encoder of emoji on its two held-out sets.

    python benchmarks/int8_accuracy.py runs/quickstart_openmoji/model --data runs/openmoji \
        -o benchmarks/results/int8_accuracy.json

Images and names both go through the exported graphs. "agree" is the share of images whose best name is the one
that the float32 graph gives.
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from openvision.evaluation.data.images import labelled_shards
from openvision.evaluation.suites.suite import HELD_OUT, load_suite
from openvision.images.preprocess import prepare, to_batch
from openvision.models.vision import normalize
from openvision.provenance import processor_name
from openvision.weights.export.onnx import Precision, open_session
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.load import Checkpoint, load_checkpoint


def scores(checkpoint: Checkpoint, folder: Path, images: torch.Tensor, names: list[str]) -> np.ndarray:
    """Cosines (images, names) of the graphs in `folder`."""
    assert checkpoint.model is not None
    assert checkpoint.tokenizer is not None
    vision, text = open_session(folder / "vision.onnx"), open_session(folder / "text.onnx")
    ids = checkpoint.tokenizer.encode(names, checkpoint.model.config.text.context_length)
    parts = [vision.run(["image_embeds"], {"images": normalize(batch).numpy()})[0] for batch in images.split(64)]
    return np.concatenate(parts) @ text.run(None, {"ids": ids})[0].T


def row_of(name: str, precision: str, found: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Accuracy of one precision on one set."""
    order = np.argsort(-found, axis=1, kind="stable")
    return {
        "set": name,
        "precision": precision,
        "top1": float((order[:, 0] == targets).mean()),
        "top5": float((order[:, :5] == targets[:, None]).any(axis=1).mean()),
        "agree": float((order[:, 0] == reference.argmax(axis=1)).mean()),
        "largest_cosine_difference": float(np.abs(found - reference).max()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a set and precision."""
    lines = ["| held-out set | precision | top-1, % | top-5, % | agree with fp32, % | largest difference of a cosine |"]
    lines.append("|---|---|" + "---:|" * 4)
    for row in rows:
        shares = [f"{100 * row[key]:.1f}" for key in ("top1", "top5", "agree")]
        cells = [row["set"], row["precision"], *shares, f"{row['largest_cosine_difference']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Export in every precision, classify both sets, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.model)
    resolution = checkpoint.vision.config.image_size
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in get_args(Precision):
            export(checkpoint, "onnx", Path(folder) / precision, ExportOptions(precision=precision))
        for name in load_suite(HELD_OUT).sets:
            data = labelled_shards(arguments.data / name)
            images = to_batch([prepare(data.images.load(row), resolution) for row in range(len(data))])
            found = {
                precision: scores(checkpoint, Path(folder) / precision, images, data.classes)
                for precision in get_args(Precision)
            }
            set_name = name.removeprefix("heldout_")
            rows += [row_of(set_name, key, value, found["fp32"], data.labels) for key, value in found.items()]
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": sys.argv,
        "machine": {"processor": processor_name(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "onnxruntime")},
        "results": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

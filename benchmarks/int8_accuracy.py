"""What lower precision in ONNX Runtime costs in zero-shot accuracy, on held-out scenes.

    python benchmarks/int8_accuracy.py runs/quickstart runs/quickstart_clip --data runs/scenes \
        -o benchmarks/results/int8_accuracy.json

Images and names both go through the exported graphs. Static int8 is calibrated on 256 images of the validation set,
which is apart from the held-out sets. "agree" is the share of images whose best name is the one that the float32 graph
gives.
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openvision.evaluation.data.images import labelled_shards
from openvision.images.preprocess import prepare, to_batch
from openvision.models.vision import normalize
from openvision.provenance import processor_name
from openvision.weights.export.onnx import open_session
from openvision.weights.export.onnx_precision import Precision
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.load import Checkpoint, load_checkpoint

FORMS: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int8, calibrated": "int8"}
SETS = ("heldout_combinations", "single_objects")
CALIBRATED_ON = 256


def embeddings(folder: Path, images: torch.Tensor) -> np.ndarray:
    """Unit vectors (images, E) of the vision graph in `folder`."""
    session = open_session(folder / "vision.onnx")
    parts = [session.run(["image_embeds"], {"images": normalize(batch).numpy()})[0] for batch in images.split(64)]
    return np.concatenate(parts)


def names_of(checkpoint: Checkpoint, folder: Path, names: list[str]) -> np.ndarray:
    """Unit vectors (names, E) of the text graph in `folder`."""
    assert checkpoint.model is not None
    assert checkpoint.tokenizer is not None
    ids = checkpoint.tokenizer.encode(names, checkpoint.model.config.text.context_length)
    return open_session(folder / "text.onnx").run(None, {"ids": ids})[0]


def prepared(folder: Path, resolution: int, most: int | None = None) -> tuple[torch.Tensor, Any]:
    """Images uint8 (n, 3, R, R) of a set of shards, at most `most` spread over it, and the set."""
    data = labelled_shards(folder)
    step = 1 if most is None else max(1, len(data) // most)
    rows = range(0, len(data), step)[:most]
    return to_batch([prepare(data.images.load(row), resolution) for row in rows]), data


def rows_of(model: str, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Export a model in every form below `folder` and classify every set."""
    checkpoint = load_checkpoint(model)
    resolution, rows = checkpoint.vision.config.image_size, []
    calibration, _ = prepared(data / "validation", resolution, CALIBRATED_ON)
    for form, precision in FORMS.items():
        static = calibration if "calibrated" in form else None
        export(checkpoint, "onnx", folder / form, ExportOptions(precision=precision, calibration=static))
    for name in SETS:
        images, labelled = prepared(data / name, resolution)
        reference = embeddings(folder / "fp32", images)
        best = (reference @ names_of(checkpoint, folder / "fp32", labelled.classes).T).argmax(axis=1)
        for form in FORMS:
            found = embeddings(folder / form, images)
            order = np.argsort(-(found @ names_of(checkpoint, folder / form, labelled.classes).T), axis=1)
            turned = 1 - (found.astype(np.float64) * reference).sum(axis=1)
            rows.append(
                {
                    "model": Path(model).name,
                    "set": name,
                    "images": len(images),
                    "precision": form,
                    "top1": float((order[:, 0] == labelled.labels).mean()),
                    "top5": float((order[:, :5] == labelled.labels[:, None]).any(axis=1).mean()),
                    "agree": float((order[:, 0] == best).mean()),
                    "turned_mean": float(turned.mean()),
                    "turned_most": float(turned.max()),
                    "megabytes": (folder / form / "vision.onnx").stat().st_size / 1e6,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a model, set and precision."""
    lines = [
        "| model | held-out set | precision | top-1, % | top-5, % | agree with fp32, % | 1 - cosine, mean | largest |"
    ]
    lines.append("|---|---|---|" + "---:|" * 5)
    for row in rows:
        shares = [f"{100 * row[key]:.1f}" for key in ("top1", "top5", "agree")]
        turned = [f"{abs(row[key]):.1e}" for key in ("turned_mean", "turned_most")]
        lines.append("| " + " | ".join([row["model"], row["set"], row["precision"], *shares, *turned]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Export in every precision, classify both sets, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(model, arguments.data, Path(folder))
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

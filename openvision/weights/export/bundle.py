"""What an edge device needs beside the graphs: a script without torch, and the vectors of the labels it tells apart.

run.py        the script, `edge.py` of this folder: numpy, Pillow and onnxruntime
labels.json   labels and their unit vectors, so that the device needs no text tower and no tokenizer
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from openvision.errors import OpenVisionError
from openvision.weights.load import Checkpoint

SCRIPT, LABELS = "run.py", "labels.json"


def write_bundle(checkpoint: Checkpoint, folder: Path, labels: Sequence[str]) -> None:
    """Write the script and, for `labels`, their vectors; raises OpenVisionError for labels without a text tower."""
    shutil.copyfile(Path(__file__).parent / "edge.py", folder / SCRIPT)
    if not labels:
        return
    if checkpoint.model is None or checkpoint.tokenizer is None:
        raise OpenVisionError(
            f"{checkpoint.source} has no text tower with a vocabulary, so labels have no vectors; leave --labels out"
        )
    ids = torch.from_numpy(checkpoint.tokenizer.encode(list(labels), checkpoint.model.config.text.context_length))
    with torch.inference_mode():
        vectors = checkpoint.model.encode_text(ids)
    content = {"labels": list(labels), "vectors": vectors.double().tolist()}
    (folder / LABELS).write_text(json.dumps(content) + "\n")

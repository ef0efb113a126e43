"""Wall time of a zero-shot evaluation over the forward passes it needs: S/16 at 224 px, JPEG files, exact decoding.

    python benchmarks/evaluation.py -o benchmarks/results/evaluation.json

Random weights, pictures made here (smooth colours with noise, 224 px a side, quality 90) in class folders. "forward" is
pictures already decoded in memory and texts already tokenized, through both towers. "evaluation" is `ZeroShot.measure`
on the folder: listing, reading, decoding, resizing, both towers, ranks, intervals. The two take turns; the ratio of a
round compares neighbours in time. Where the time goes is told from clocks round the towers and a decoding of its own.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from openvision.encoding import encode_texts, evaluating
from openvision.evaluation.data.images import folder_of_classes
from openvision.evaluation.evaluators.base import parse_evaluators
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.images.preprocess import prepare
from openvision.models.layers import unit
from openvision.models.openvision import OpenVision
from openvision.models.variants import variant
from openvision.models.vision import normalize
from openvision.provenance import library_versions, processor_name
from openvision.text.tokenizer import Tokenizer

SIDE = 224


def write_pictures(folder: Path, count: int, classes: int) -> None:
    """JPEGs in class folders: noise on smooth colours is about as hard to decode as a photograph."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64)
        pixels = np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        place = folder / f"class {number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        (place / f"{number}.jpg").write_bytes(buffer.getvalue())


def forward_alone(model: OpenVision, tokenizer: Tokenizer, images: torch.Tensor, names: list[str], batch: int) -> float:
    """Seconds of both towers on what is ready in memory."""
    start = time.perf_counter()
    with evaluating(model):
        for part in images.split(batch):
            unit(model.vision.project(model.vision.forward_features(normalize(part)).pooled))
    encode_texts(model, tokenizer, names)
    return time.perf_counter() - start


@contextmanager
def clocked(owner: Any, name: str, spent: dict[str, float]) -> Any:
    """Add the seconds that calls of a method take to `spent`."""
    real: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(*arguments, **options)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)


def evaluate(model: OpenVision, tokenizer: Tokenizer, root: Path, batch: int, threads: int) -> dict[str, float]:
    """Seconds of the whole evaluation, and of the towers within it."""
    (evaluator,) = parse_evaluators([{"kind": "zero_shot", "data": "pictures"}], "benchmark")
    evaluated = EvaluatedModel(model.vision, model, tokenizer, batch_size=batch, threads=threads)
    spent: dict[str, float] = {}
    with clocked(model.vision, "forward_features", spent), clocked(model, "encode_text", spent):
        start = time.perf_counter()
        evaluator.measure(evaluated, root)
        total = time.perf_counter() - start
    towers = sum(spent.values())
    return {"total": total, "towers": towers, "other": total - towers}


def decode_alone(root: Path) -> float:
    """Seconds a picture to read, decode and prepare in one thread, with torch kept to one thread too."""
    data = folder_of_classes(root / "pictures").images
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    for index in range(len(data)):
        prepare(data.load(index), SIDE)
    torch.set_num_threads(threads)
    return (time.perf_counter() - start) / len(data)


def run(pictures: int, rounds: int, batch: int, threads: int) -> dict[str, Any]:
    """All measurements, with the ratio of every round."""
    torch.manual_seed(0)
    model = OpenVision(variant("small", 16, SIDE)).eval()
    classes = min(20, pictures)
    names = [f"class {number}" for number in range(classes)]
    tokenizer = Tokenizer.train(names, 60)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pictures(root / "pictures", pictures, classes)
        data = folder_of_classes(root / "pictures").images
        images = torch.from_numpy(np.stack([data.load(index) for index in range(pictures)])).permute(0, 3, 1, 2)
        images = images.contiguous()
        forward_alone(model, tokenizer, images[:batch], names, batch)
        turns = []
        for _ in range(rounds):
            forward = forward_alone(model, tokenizer, images, names, batch)
            turns.append({"forward": forward, **evaluate(model, tokenizer, root, batch, threads)})
        decode = decode_alone(root)
    ratios = [turn["total"] / turn["forward"] for turn in turns]
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor_name(), "threads": torch.get_num_threads()},
        "libraries": library_versions(),
        "pictures": pictures,
        "batch": batch,
        "decode_threads": threads,
        "decode_ms": 1000 * decode,
        "rounds": turns,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def table(found: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "| round | forward alone, s | evaluation, s | towers within it, s | all else, s | ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for number, (turn, ratio) in enumerate(zip(found["rounds"], found["ratios"], strict=True), start=1):
        cells = [turn["forward"], turn["total"], turn["towers"], turn["other"]]
        lines.append(f"| {number} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {ratio:.3f} |")
    lines.append(
        f"\n{found['pictures']} pictures, batch {found['batch']}, {found['decode_threads']} decoding threads on "
        f"{found['machine']['threads']} threads of {found['machine']['processor']}. Median ratio {found['ratio']:.3f}. "
        f'Reading, decoding and preparing one picture takes {found["decode_ms"]:.2f} ms on one core. "All else" is '
        "what the towers wait for: mostly the first batches, ranks and intervals."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write JSON and a table beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="threads that decode")
    parser.add_argument("-o", "--output", type=Path, help="JSON file; a table is written beside it as .md")
    arguments = parser.parse_args()
    found = run(arguments.pictures, arguments.rounds, arguments.batch, arguments.threads)
    print(table(found))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()

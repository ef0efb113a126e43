"""Loader throughput against open_clip's webdataset pipeline: the same JPEGs, the same number of workers.

    .venv-oracle/bin/python benchmarks/data.py -o benchmarks/results/data.json

The shards hold 512 px JPEGs of 70 to 100 kB: OpenMoji glyphs on shaded backgrounds with sensor noise, since flat
drawings decode faster than photographs. Both sides decode, crop at random and resize. open_clip also normalises in
float32, which we leave to the device; we tokenize two texts and a caption target a sample, open_clip one text of
constant cost. "with jitter" adds the recipe's colour jitter and grayscale on our side only. Each run has its own
process; runs alternate, and the median counts.

Two more numbers are ours alone: resident memory over 200,000 samples, and the cost of starting at position 10^9 of a
billion samples.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torchvision_operators as torchvision_operators
from PIL import Image

from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.shards.dataset import Sample, ShardDataset, ShardWriter
from openvision.data.sources.openmoji.glyphs import all_names, render_glyph
from openvision.errors import require
from openvision.images.augment import Augment
from openvision.provenance import processor_name
from openvision.text.tokenizer import Tokenizer

SIDES = ("open_clip", "ours", "ours with jitter")
BATCH = 64
CAPTION = "A drawing on a shaded ground. The colours are bright. It was taken with a noisy camera."


def photograph(character: str, side: int, rng: np.random.Generator) -> bytes:
    """A glyph on a shaded background with sensor noise, as JPEG bytes."""
    drawing = Image.fromarray(render_glyph(character, 256))
    glyph = np.asarray(drawing.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    corners = Image.fromarray(rng.integers(60, 255, (3, 3, 3), dtype=np.uint8))
    ground = np.asarray(corners.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    scene = glyph * ground / 255 + rng.normal(0, 10, glyph.shape)
    buffer = io.BytesIO()
    Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=87)
    return buffer.getvalue()


def make_shards(folder: Path, count: int, side: int = 512) -> float:
    """Write `count` photographs into shards of 100; their mean size in kB."""
    rng = np.random.default_rng(0)
    names = all_names()
    sizes = []
    with ShardWriter(folder, samples_per_shard=100) as writer:
        for number in range(count):
            name = names[number % len(names)]
            data = photograph(name.emoji, side, rng)
            sizes.append(len(data))
            writer.write(f"{number:06d}", data, "jpg", f"{name.text} photo", {"synthetic": CAPTION})
    return statistics.mean(sizes) / 1000


@contextmanager
def our_batches(folder: Path, size: int, workers: int, jitter: bool) -> Iterator[Iterator[Any]]:
    """Batches of our loader, with the published crops."""
    augment = Augment() if jitter else Augment(jitter_probability=0, grayscale_probability=0)
    with Loader(
        ShardDataset(folder),
        Tokenizer.train(["a photo", CAPTION], 200),
        InputSpec(size, context_length=80, caption_length=128, augment=augment),
        batch_size=BATCH,
        seed=0,
        options=LoaderOptions(workers=workers),
    ) as loader:
        yield iter(loader)


def their_batches(folder: Path, size: int, workers: int) -> Iterator[Any]:
    """Batches of open_clip's training pipeline over the same shards."""
    open_clip, data = require("open_clip", extra="open_clip"), require("open_clip_train.data", extra="open_clip")
    preprocess = open_clip.image_transform(size, is_train=True, aug_cfg={"scale": (0.4, 1.0)})
    constant = torch.zeros(1, 77, dtype=torch.long)
    arguments = SimpleNamespace(
        train_data=f"{folder}/{{000000..{len(list(folder.glob('*.tar'))) - 1:06d}}}.tar",
        train_num_samples=10**9,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
    )
    info = data.get_wds_dataset(arguments, preprocess, is_train=True, tokenizer=lambda text: constant)
    return iter(info.dataloader)


def measure(side: str, folder: Path, size: int, workers: int, seconds: float) -> float:
    """Images a second of one side, after its buffers have filled."""
    torch.set_num_threads(1)
    if side == "open_clip":
        return _rate(their_batches(folder, size, workers), workers, seconds)
    with our_batches(folder, size, workers, jitter=side.endswith("jitter")) as batches:
        return _rate(batches, workers, seconds)


def _rate(batches: Iterator[Any], workers: int, seconds: float) -> float:
    for _ in range(4 * workers):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - start)


def memory_over(folder: Path, samples: int) -> list[tuple[int, int]]:
    """Samples read and resident MiB, at twenty points of a long reading in this process."""
    points = []
    with our_batches(folder, 32, workers=0, jitter=False) as batches:
        for number in range(1, samples // BATCH + 1):
            next(batches)
            if number % (samples // BATCH // 20) == 0:
                points.append((number * BATCH, _resident()))
    return points


class Billion:
    """A billion copies of one sample: the cost of a stream without its images."""

    folder = "a billion samples"

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 10**9

    def key(self, index: int) -> str:
        """Key of a sample."""
        return str(index)

    def __getitem__(self, index: int) -> Sample:
        return self.sample


def restore(folder: Path) -> dict[str, float]:
    """Seconds to the first batch at position 10^9, and MiB that it took."""
    sample = ShardDataset(folder)[0]
    tokenizer = Tokenizer.train(["a photo", CAPTION], 200)
    before, start = _resident(), time.perf_counter()
    data = cast(ShardDataset, Billion(sample))
    inputs = InputSpec(84, context_length=80, caption_length=128)
    loader = Loader(data, tokenizer, inputs, batch_size=BATCH, seed=0, start=10**9)
    next(loader)
    result = {"seconds": time.perf_counter() - start, "mebibytes": _resident() - before}
    loader.close()
    return result


def _resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


def in_own_process(*arguments: object) -> Any:
    """Run this script with `--one` and return its last line, parsed."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(task: str, folder: Path, *rest: str) -> Any:
    """The task of one process."""
    if task == "memory":
        return memory_over(folder, int(rest[0]))
    if task == "restore":
        return restore(folder)
    size, workers, seconds = int(rest[0]), int(rest[1]), float(rest[2])
    return measure(task, folder, size, workers, seconds)


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| to px | " + " | ".join(f"{side}, images/s" for side in SIDES) + " | ours | ours with jitter |"]
    lines.append("|---:|" + "---:|" * (len(SIDES) + 2))
    for size, rates in report["images_per_second"].items():
        ratios = [f"{rates[side] / rates['open_clip']:.2f}x" for side in SIDES[1:]]
        lines.append(f"| {size} | " + " | ".join([*(f"{rates[side]:.0f}" for side in SIDES), *ratios]) + " |")
    settled = [resident for _, resident in report["memory"]]
    growth = settled[-1] / settled[0] - 1
    restored = report["restore"]
    lines += [
        "",
        f"Images: {report['kilobytes']:.0f} kB each, {report['workers']} workers.",
        f"Resident memory over {report['memory'][-1][0]:,} samples: {settled[0]} MiB after the first twentieth, "
        f"{settled[-1]} MiB at the end ({growth:+.1%}).",
        f"First batch at position 10^9 of 10^9 samples: {restored['seconds']:.2f} s, {restored['mebibytes']} MiB.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[84, 224])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=1200, help="images in the shards")
    parser.add_argument("--seconds", type=float, default=12.0, help="duration of each run")
    parser.add_argument("--turns", type=int, default=3, help="runs of each side")
    parser.add_argument("--samples", type=int, default=200_000, help="samples of the memory measurement")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        task, folder, *rest = arguments.one
        print(json.dumps(one(task, Path(folder), *rest)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shards"
        kilobytes = make_shards(folder, arguments.images)
        rates: dict[int, dict[str, list[float]]] = {size: {side: [] for side in SIDES} for size in arguments.sizes}
        for _ in range(arguments.turns):
            for size, sides in rates.items():
                for side, found in sides.items():
                    found.append(in_own_process(side, folder, size, arguments.workers, arguments.seconds))
                    print(f"{size} px, {side}: {found[-1]:.0f} images/s", file=sys.stderr, flush=True)
        report = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": sys.argv,
            "machine": {"processor": processor_name(), "cores": os.cpu_count()},
            "versions": {name: version(name) for name in ("torch", "grain", "simplejpeg", "pillow", "webdataset")},
            "workers": arguments.workers,
            "kilobytes": kilobytes,
            "turns": rates,
            "images_per_second": {
                size: {side: statistics.median(found) for side, found in sides.items()} for size, sides in rates.items()
            },
            "memory": in_own_process("memory", folder, arguments.samples),
            "restore": in_own_process("restore", folder),
        }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()

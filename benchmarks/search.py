"""Search among a million vectors: build time, recall and time of a query, against brute force, on one core.

    python benchmarks/search.py --model runs/quickstart --images runs/scenes/train -o benchmarks/results/search.json

Vectors are features of real images, so that they cluster as embeddings do: of each image the mean patch tokens of the
last layers, as many as give the width. From each of them many are made by adding a share of the difference of two
others, and a little noise: that stays within the directions that the images span. Queries are made in the same way and
are not in the index. A table is written beside the JSON file. On a busy machine `taskset -c 1 chrt -r 1` before the
command keeps a core for it, as root.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TOP = 10
_SHARE, _NOISE, _BATCH, _TIMED_EXACT = 0.35, 0.02, 256, 20


def image_features(model: str, images: Path, count: int, width: int) -> NDArray[np.float32]:
    """Features (n, width) of at most `count` images."""
    import torch

    import openvision
    from openvision.inference.embed import images_of

    encoder, found = openvision.load_vision(model), images_of(images)
    layers = -(-width // encoder.width)
    rows = np.linspace(0, len(found.keys) - 1, min(count, len(found.keys))).astype(int)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            batch = encoder.preprocess_all(found.load(int(row)) for row in rows[start : start + _BATCH])
            kept = encoder.forward_features(batch, layers=range(-layers, 0)).layers
            means = [torch.nn.functional.normalize(layer.patch_tokens.mean(1), dim=-1) for layer in kept]
            parts.append(torch.cat(means, dim=-1)[:, :width].numpy())
    features = np.concatenate(parts)
    return features - features.mean(axis=0)


def jittered(features: NDArray[np.float32], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """`count` unit vectors near those of images."""
    first, second, third = rng.integers(0, len(features), (3, count))
    length = np.linalg.norm(features, axis=1).mean() / features.shape[1] ** 0.5
    noise = rng.standard_normal((count, features.shape[1]), dtype=np.float32)
    vectors = features[first] + _SHARE * (features[second] - features[third]) + _NOISE * length * noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_vectors(folder: Path, features: NDArray[np.float32], count: int, seed: int) -> None:
    """A folder of vectors as `openvision encode` writes it."""
    from openvision.inference.vector_folder import SHARD, Job, write_manifest, write_shard

    counts = [min(SHARD, count - start) for start in range(0, count, SHARD)]
    folder.mkdir()
    for number, rows in enumerate(counts):
        vectors = jittered(features, rows, np.random.default_rng((seed, number)))
        write_shard(folder / f"{number:06d}.npy", [f"{number}-{row}" for row in range(rows)], vectors, {})
    job = Job("/", "", "", "benchmark", [1, 1], "crop", SHARD, "npy")
    write_manifest(folder, job, features.shape[1], counts)


def measure(folder: Path, queries: NDArray[np.float32], recall: float) -> dict[str, float]:
    """Build the index and search with it and without it."""
    from openvision.inference.index import LISTS, VectorIndex, build_approximate, exact_neighbours

    built = build_approximate(folder, recall, say=lambda line: print(line, file=sys.stderr))
    exact, approximate = VectorIndex.open(folder, exact=True), VectorIndex.open(folder)
    truth = [set(row.tolist()) for row in exact_neighbours(exact.vectors, queries, TOP)]
    slow, fast, found = [], [], []
    for query in queries[:_TIMED_EXACT]:
        start = time.perf_counter()
        exact.nearest(query, TOP)
        slow.append(time.perf_counter() - start)
    for query, wanted in zip(queries, truth, strict=True):
        start = time.perf_counter()
        numbers, _ = approximate.nearest(query, TOP)
        fast.append(time.perf_counter() - start)
        found.append(len(wanted & set(numbers.tolist())) / TOP)
    return {
        "build_seconds": built.seconds,
        "lists": built.lists,
        "probes": built.probes,
        "recall_on_own_vectors": built.recall,
        "index_bytes": (folder / LISTS).stat().st_size,
        "recall_at_10": float(np.mean(found)),
        "p50_ms": 1000 * float(np.percentile(fast, 50)),
        "p95_ms": 1000 * float(np.percentile(fast, 95)),
        "exact_p50_ms": 1000 * float(np.percentile(slow, 50)),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def table(content: dict) -> str:
    """The numbers as Markdown."""
    said = content["measured"]
    head = f"{content['vectors']:,} vectors of width {content['width']}, jittered from {content['images']:,} images"
    load = f" Other programs used the machine (load {content['load']:.0f})" if content["load"] > 2 else ""
    load += (", but not this core." if content["real_time"] else ".") if load else ""
    lists = f"FAISS, {said['probes']} of {said['lists']} lists"
    return f"""{head}
({content["date"]}, one core of {content["processor"]}, {content["queries"]} queries):

| | p50 | p95 | recall at 10 |
|---|---:|---:|---:|
| exact, numpy | {said["exact_p50_ms"]:.0f} ms | | 1 |
| {lists} | {said["p50_ms"]:.1f} ms | {said["p95_ms"]:.1f} ms | {said["recall_at_10"]:.3f} |

Building took {said["build_seconds"]:.0f} s, and the index has {said["index_bytes"] / 1e6:.0f} MB. The process had at
most {said["peak_bytes"] / 1e9:.1f} GB of memory, mapped vectors included.{load}
"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart")
    parser.add_argument("--images", type=Path, default=Path("runs/scenes/train"))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--most-images", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--recall", type=float, default=0.97)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    # Before numpy's and FAISS's threads are started.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from openvision.provenance import git_state, processor_name

    features = image_features(options.model, options.images, options.most_images, options.width)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        write_vectors(folder, features, options.vectors, seed=0)
        queries = jittered(features, options.queries, np.random.default_rng(1_000_000_007))
        measured = measure(folder, queries, options.recall)
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor_name(),
        "git": git_state(),
        "vectors": options.vectors,
        "width": features.shape[1],
        "images": len(features),
        # Of the last fifteen minutes: on a busy machine the slowest queries wait for a core.
        "load": os.getloadavg()[2],
        "real_time": os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO),
        "queries": options.queries,
        "measured": measured,
    }
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    options.output.with_suffix(".md").write_text(table(content))
    print(table(content))


if __name__ == "__main__":
    main()

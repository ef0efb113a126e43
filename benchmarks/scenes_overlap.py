"""How many images of each other split of composed scenes occur in training, byte for byte.

    python benchmarks/scenes_overlap.py runs/scenes
    python benchmarks/scenes_overlap.py runs/scenes runs/eval/quickstart

Folders of `openvision eval` may follow: the share of single objects that is named, of all and of those that training
has not seen.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from openvision.data.shards.dataset import ShardDataset

SINGLE = "single_objects"


def digests(folder: Path) -> list[str]:
    """SHA-256 of the images of a folder of shards, in order."""
    return [hashlib.sha256(sample.image).hexdigest() for sample in ShardDataset(folder)]


def main() -> None:
    """Print the overlap, and what it does to names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, help="folder that `openvision data scenes` wrote")
    parser.add_argument("evaluations", type=Path, nargs="*", help="folders with outcomes.safetensors")
    arguments = parser.parse_args()
    trained = set(digests(arguments.scenes / "train"))
    for split in sorted(path.name for path in arguments.scenes.iterdir() if path.is_dir() and path.name != "train"):
        known = [digest in trained for digest in digests(arguments.scenes / split)]
        print(f"{split}: {sum(known)} of {len(known)} images are in training")
    known = np.array([digest in trained for digest in digests(arguments.scenes / SINGLE)])
    for folder in arguments.evaluations:
        outcomes = load_file(folder / "outcomes.safetensors")
        (name,) = (key.removesuffix("/values") for key in outcomes if key.endswith("/top1/values") and "single" in key)
        right, images = outcomes[f"{name}/values"].astype(float), outcomes[f"{name}/units"]
        unseen = right[~known[images]]
        print(f"{folder.name}: named {100 * right.mean():.1f} %, of those not in training {100 * unseen.mean():.1f} %")


if __name__ == "__main__":
    main()

"""Compare the losses of the working tree with those of another commit, bit for bit.

    python benchmarks/golden_losses.py HEAD

Trains the quickstart recipe for a few steps of each stage on the OpenMoji shards, once with the package of the commit
(in a temporary git worktree) and once with the working tree, both under this interpreter. Exits with 1 when any loss,
temperature or final weight differs.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT = [
    f"stages.{stage}.{key}={value}"
    for stage in range(3)
    for key, value in (("samples", 256), ("batch_size", 64), ("warmup_samples", 0))
]
SETTINGS = [*SHORT, "run.log_every=1", "run.evaluate_every=1000", "run.precision=float32"]
COMPARED = ("loss", "contrastive_alt", "contrastive_sentence", "caption", "temperature")


def losses(package: Path, data: Path, run: Path) -> list[dict[str, float | str]]:
    """Train with the package in the folder `package`; every step's losses, then the hash of the weights."""
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "openvision.cli.main", "train", str(package / "recipes/quickstart.toml")]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    subprocess.run(
        [*command, "--data", str(data), "--run", str(run), *sets],
        cwd=package,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [{name: line[name] for name in COMPARED} for line in lines if line["kind"] == "train"]
    return [*steps, {"weights": hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()}]


def main() -> None:
    """Compare two commits and print the first difference."""
    base = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree, data = folder / "base", folder / "data"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), base], cwd=ROOT, check=True)
        try:
            command = [sys.executable, "-m", "openvision.cli.main", "data", "openmoji", str(data)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            before, after = losses(tree, data, folder / "run-base"), losses(ROOT, data, folder / "run-here")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    for step, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        if old != new:
            sys.exit(f"golden: step {step} differs\n  {base}: {old}\n  here: {new}")
    print(f"golden: {len(before) - 1} steps and the final weights are bit-identical to {base}")


if __name__ == "__main__":
    main()

"""Compare what the working tree trains with what another commit trains, bit for bit.

    python benchmarks/golden_losses.py HEAD
    python benchmarks/golden_losses.py HEAD --only fsdp,bf16

Every case trains a few steps of a frozen recipe (benchmarks/golden/) on the OpenMoji shards, once with the package of
the commit (in a temporary git worktree) and once with the working tree, side by side under this interpreter. Exits with
1 and names the first case and step at which a number of the log or a final weight differs.

Recipes and cases are written with the names of November 2026. Whoever renames a recipe key or a number of the log adds
it to RENAMED_KEYS or RENAMED_METRICS below: that keeps commits from before and after the change comparable.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
RECIPES = Path(__file__).parent / "golden"

# Recipe keys that were renamed: dotted name in the recipes here, numbers of tables left out -> the name since.
# A key may move to another table that way. A package that calls the old name unknown is given the new one.
RENAMED_KEYS: dict[str, str] = {
    "stages.accumulate": "stages.micro_batches",
    "augment.crop_law": "augment.crop_sampling",
    "parallel.start_seconds": "parallel.start_timeout_seconds",
    "parallel.step_seconds": "parallel.step_timeout_seconds",
}
# Numbers of the log that were renamed: name of November 2026 -> the name since.
RENAMED_METRICS: dict[str, str] = {"temperature": "logit_scale", "pictures": "images"}

# Where a run leaves what is compared.
METRICS = "metrics.jsonl"
MODEL = "model"
WEIGHTS = "model.safetensors"
# Numbers of the log that measure the machine.
TIMES = {"seconds", "images_per_second", "tflops_per_second", "data_wait", "memory_gib"}
CLI = ["-m", "openvision.cli.main"]

# Towers in which the variants of OpenVision 1 are trained: enough for every kind of parameter.
SMALL = {
    "model.embed_dim": 64,
    "model.vision.width": 96,
    "model.vision.depth": 3,
    "model.vision.mlp_dim": 384,
    "model.vision.heads": 2,
    "model.text.width": 64,
    "model.text.depth": 2,
    "model.text.mlp_dim": 256,
    "stages.*.batch_size": 32,
    "stages.*.samples": 96,
    # Measured in the first three cases; the variants spend their time on training.
    "data.validation": None,
}


@dataclass(frozen=True)
class Case:
    """One run: a frozen recipe and what is changed in it."""

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value; `*` stands for every stage, None removes the key."""
    processes: int = 1
    trained_too: bool = False
    """The model folder holds averaged weights: compare those that were trained as well."""


CASES = {
    "openvision": Case("openvision"),
    "clip": Case("clip"),
    "openvision2": Case("openvision2"),
    "caching": Case("openvision", {**SMALL, "stages.*.accumulate": 4}),
    "bf16": Case("openvision", {**SMALL, "run.precision": "bfloat16"}),
    "ema": Case(
        "openvision",
        {
            **SMALL,
            "optimizer.ema": 0.9,
            "optimizer.clip_norm": 1.0,
            "stages.*.drop_path": 0.2,
            "augment.crop_law": "random_resized",
            "augment.crop_area": [0.4, 1.0],
            "augment.jitter": 0.4,
            "augment.grayscale_probability": 0.2,
        },
        trained_too=True,
    ),
    "ddp": Case("openvision", SMALL, processes=2),
    "fsdp": Case("openvision", {**SMALL, "parallel.mode": "fsdp"}, processes=2),
}

Numbers = dict[str, Any]
Trained = tuple[list[Numbers], Numbers]
"""The lines of the log that are compared, and the hash of every weight."""


def recipe_of(case: Case) -> dict[str, Any]:
    """The recipe of a case, under the names it was frozen with."""
    recipe = tomllib.loads((RECIPES / f"{case.recipe}.toml").read_text(encoding="utf-8"))
    for key, value in case.changes.items():
        *parents, last = key.split(".")
        for table in _tables(recipe, parents, make=True):
            if value is None:
                table.pop(last, None)
            else:
                table[last] = value
    return recipe


def write_recipe(case: Case, package: Path, path: Path) -> None:
    """Write the recipe of a case under the names that a package knows."""
    recipe = recipe_of(case)
    path.write_text(tomli_w.dumps(recipe), encoding="utf-8")
    # Once more after a change: what stands in a table that was renamed may have been renamed, too.
    while candidates := [old for old in RENAMED_KEYS if _holds(recipe, old)]:
        answer = _python(package, [*CLI, "recipe", "validate", str(path)], check=False).stderr
        unknown = {re.sub(r"\.\d+(?=\.|$)", "", place) for place in re.findall(r"unknown key ([\w.]+)", answer)}
        if unknown.isdisjoint(candidates):
            return
        for old in unknown.intersection(candidates):
            rename(recipe, old, RENAMED_KEYS[old])
        path.write_text(tomli_w.dumps(recipe), encoding="utf-8")


def rename(recipe: dict[str, Any], old: str, new: str) -> None:
    """Give a key of a recipe its new name, in every stage where it stands in the stages."""
    (*before, last), (*after, since) = old.split("."), new.split(".")
    sources, targets = _tables(recipe, _starred(before)), _tables(recipe, _starred(after), make=True)
    for source, target in zip(sources, targets, strict=True):
        if last in source:
            target[since] = source.pop(last)


def _holds(recipe: dict[str, Any], key: str) -> bool:
    *parents, last = key.split(".")
    return any(last in table for table in _tables(recipe, _starred(parents)))


def _starred(parents: list[str]) -> list[str]:
    return [part for name in parents for part in ((name, "*") if name == "stages" else (name,))]


def _tables(recipe: dict[str, Any], parents: list[str], make: bool = False) -> list[dict[str, Any]]:
    """The tables at a place, made where they are missing if asked; `*` stands for every one of an array."""
    tables: list[Any] = [recipe]
    for name in parents:
        if name == "*":
            tables = [each for table in tables for each in table]
        else:
            tables = [table.setdefault(name, {}) if make else table[name] for table in tables if make or name in table]
    return tables


def train(package: Path, case: Case, data: Path, folder: Path) -> Trained:
    """Train a case with the package in the folder `package`."""
    folder.mkdir(parents=True)
    recipe, run = folder / "recipe.toml", folder / "run"
    write_recipe(case, package, recipe)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes), "-m", "--", CLI[1]]
    command = CLI if case.processes == 1 else start
    _python(package, [*command, "train", str(recipe), "--data", str(data), "--run", str(run)])
    found = weights(run / MODEL)
    if case.trained_too:
        _python(package, [*CLI, "checkpoint", "export", str(run), "-o", str(folder / "trained")])
        found |= {f"{name} before averaging": digest for name, digest in weights(folder / "trained").items()}
    return log((run / METRICS).read_text(encoding="utf-8")), found


def _python(package: Path, arguments: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with a package, on one thread a process; ends here with what it said when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=package, env=environment, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        sys.exit(f"golden: {package}: {' '.join(arguments)} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return done


def log(text: str) -> list[Numbers]:
    """The lines of training and measuring, without what measures the machine, under the names of November 2026."""
    former = {new: old for old, new in RENAMED_METRICS.items()}
    lines: list[Numbers] = [json.loads(line) for line in text.splitlines()]
    lines = [{former.get(name, name): value for name, value in line.items()} for line in lines]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def weights(folder: Path) -> Numbers:
    """Name of every tensor of a model folder -> hash of its shape, dtype and values."""
    found: Numbers = {}
    with safe_open(folder / WEIGHTS, "numpy") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            described = f"{tensor.dtype}{tensor.shape}".encode()
            found[name] = hashlib.sha256(described + tensor.tobytes()).hexdigest()
    return found


def difference(before: Trained, after: Trained) -> str | None:
    """The first number or weight in which two runs differ; None when they are the same.

    A number that only the new log has is no difference; one that it lacks is.
    """
    (old_lines, old_weights), (new_lines, new_weights) = before, after
    for old, new in zip(old_lines, new_lines, strict=False):
        for name, value in old.items():
            if name not in new:
                return f"step {old['step']}: {name} is missing from the log; was it renamed (RENAMED_METRICS)?"
            # As text, so that every bit counts and a NaN equals itself.
            if repr(value) != repr(new[name]):
                return f"step {old['step']}: {name} of {old['kind']} is {new[name]!r}, was {value!r}"
    if len(old_lines) != len(new_lines):
        return f"the log has {len(new_lines)} lines, had {len(old_lines)}"
    for name in sorted({*old_weights, *new_weights}):
        if old_weights.get(name) != new_weights.get(name):
            return f"after the last step: the weight {name} differs"
    return None


@contextmanager
def worktree(base: str, folder: Path) -> Iterator[Path]:
    """The commit `base`, checked out into `folder` as long as the context lasts."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), base], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def selected(names: str | None) -> dict[str, Case]:
    """The cases named in a list with commas, all without one; exits when one is unknown."""
    chosen = list(CASES) if names is None else names.split(",")
    if unknown := [name for name in chosen if name not in CASES]:
        sys.exit(f"golden: no case is named {', '.join(unknown)} (known: {', '.join(CASES)})")
    return {name: CASES[name] for name in chosen}


def main() -> None:
    """Compare two commits, a line for each case, up to the first difference."""
    parser = argparse.ArgumentParser(description="Compare what two commits train, bit for bit.")
    parser.add_argument("base", nargs="?", default="HEAD", help="commit to compare the working tree with")
    parser.add_argument("--only", metavar="CASES", help=f"some of {','.join(CASES)}")
    arguments = parser.parse_args()
    cases = selected(arguments.only)
    with tempfile.TemporaryDirectory() as name, worktree(arguments.base, Path(name) / "base") as base:
        folder, data = Path(name), Path(name) / "data"
        _python(ROOT, [*CLI, "data", "openmoji", str(data)])
        with ThreadPoolExecutor(2) as both:
            for title, case in cases.items():
                sides = ((base, f"{title}-base"), (ROOT, f"{title}-here"))
                started = [both.submit(train, package, case, data, folder / place) for package, place in sides]
                before, after = (one.result() for one in started)
                if (found := difference(before, after)) is not None:
                    sys.exit(f"golden: {title} differs from {arguments.base}\n  {found}")
                steps = sum(line["kind"] == "train" for line in before[0])
                print(f"golden: {title}: {steps} steps and the final weights are bit-identical", flush=True)
    print(f"golden: {len(cases)} of {len(CASES)} cases are bit-identical to {arguments.base}")


if __name__ == "__main__":
    main()

"""Damaged files, hostile recipes and damaged run folders: one sentence each, never a traceback or a hang."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from hostile import SIZES, Count, conclude, copied, damage, damaged_bytes, generator, mutate
from safetensors.torch import save_file

from openvision.recipe.schema import load_recipe
from openvision.recipe.view import check_recipe
from openvision.renamed import read_metrics
from openvision.text.tokenizer import Tokenizer
from openvision.training.checkpoint.folders import checkpoints, find_checkpoint, read_state, table_of, verify
from openvision.training.run.sessions import read_sessions
from openvision.weights.load import Request, load_checkpoint
from openvision.weights.open_clip import config_to_open_clip, to_open_clip

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "tests/golden/run-2026-11/openvision"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """One folder of each layout, and what reads it."""
    root = tmp_path_factory.mktemp("sources")
    model = load_checkpoint(RUNS / "finished/model").model
    assert model is not None
    state = {name: tensor.contiguous() for name, tensor in to_open_clip(model.state_dict(), model.config).items()}
    for name in ("open_clip", "torch", "npz", "vocabulary"):
        (root / name).mkdir()
    for folder, write in (("open_clip", save_file), ("torch", torch.save)):
        file = "open_clip_model.safetensors" if folder == "open_clip" else "open_clip_pytorch_model.bin"
        write(state, root / folder / file)
        (root / folder / "open_clip_config.json").write_text(json.dumps(config_to_open_clip(model.config)))
    with np.load(ROOT / "tests/golden/openvision_tiny.npz") as archive:
        arrays = {name.removeprefix("param:"): archive[name] for name in archive.files if name.startswith("param:")}
    np.savez(root / "npz/tree.npz", **arrays)  # pyright: ignore[reportArgumentType]
    (root / "vocabulary/vocab.txt").write_text("[PAD]\n[bos]\n[eos]\n[UNK]\n[CLS]\na\n##b\n")
    return {
        "model folder": (RUNS / "finished/model", load_checkpoint),
        "open_clip folder": (root / "open_clip", load_checkpoint),
        "torch file": (root / "torch", load_checkpoint),
        "npz": (root / "npz", lambda folder: load_checkpoint(folder / "tree.npz", Request(image_size=32))),
        "vocabulary": (root / "vocabulary", lambda folder: Tokenizer.load(folder / "vocab.txt")),
        "tokenizer": (RUNS / "finished/tokenizer", lambda folder: Tokenizer.load(folder).encode(["a dog"])),
        "checkpoint": (RUNS / "stopped/checkpoints/step-00000004", lambda folder: (read_state(folder), verify(folder))),
    }


@pytest.mark.parametrize("times", SIZES)
def test_damaged_files(sources, tmp_path, times) -> None:
    rng, count = generator(1, times), Count()
    for kind, (folder, read) in sources.items():
        for number in range(3 * times):
            with copied(folder, tmp_path / "copy") as copy:
                path = rng.choice(sorted(path for path in copy.iterdir() if path.is_file()))
                what = f"{number}: {path.name} {damage(path, rng)}"
                count.attempt(kind, what, lambda copy=copy, read=read: read(copy))
    conclude(count, 150, times)


KNOWN = {
    "width 0": "model.vision.width=0",
    "negative width": "model.text.width=-64",
    "heads that do not divide": "model.vision.heads=7",
    "patch 0": "model.vision.patch_size=0",
    "depth -1": "model.vision.depth=-1",
    "length 2": "model.text.context_length=2",
    "caption of 2": "model.decoder.caption_length=2",
    "seed beyond 63 bits": "seed=9223372036854775808",
    "infinite seconds": "run.hang_seconds=inf",
    "no number": "optimizer.eps=nan",
    "betas of 2": "optimizer.betas=[2.0, 2.0]",
    "too many patches": "stages.0.resolution=1000000",
    "more samples than an int64": "stages.0.samples=100000000000000000000",
}


@pytest.mark.parametrize("case", KNOWN)
def test_recipes_that_trained_or_crashed(case) -> None:
    with pytest.raises(Exception, match=KNOWN[case].split("=")[0].rpartition(".")[2]) as raised:
        load_recipe(ROOT / "recipes/quickstart.toml", [KNOWN[case]])
    assert type(raised.value).__name__ == "OpenVisionError"


@pytest.mark.parametrize("times", SIZES)
def test_hostile_recipes(tmp_path, times) -> None:
    rng, count = generator(2, times), Count()
    for name in ("quickstart", "clip", "openvision2/l14"):
        text = (ROOT / f"recipes/{name}.toml").read_text()
        for number in range(4 * times):
            path = tmp_path / "recipe.toml"
            what, data = damaged_bytes(text.encode(), rng)
            if number % 4:
                what, changed = mutate(tomllib.loads(text), rng)
                data = as_toml(changed)
            path.write_bytes(data)
            count.attempt(f"recipe {name}", f"{number}: {what}", lambda path=path: check_recipe(path))
    conclude(count, 80, times)


def as_toml(content: object) -> bytes:
    """TOML of a mutated recipe; what TOML cannot hold becomes a text."""
    if isinstance(content, dict):
        try:
            return tomli_w.dumps(json.loads(json.dumps(content), object_pairs_hook=_without_null)).encode()
        except (TypeError, ValueError):
            return repr(content).encode()
    return repr(content).encode()


def _without_null(pairs: list[tuple[str, object]]) -> dict[str, object]:
    return {key: value for key, value in pairs if value is not None}


@pytest.mark.parametrize("times", SIZES)
def test_damaged_run_folders(tmp_path, times) -> None:
    rng, count = generator(3, times), Count()
    for name, readers in {
        "stopped": (table_of, lambda run: [read_state(path) for path in checkpoints(run / "checkpoints")], best),
        "finished": (load_checkpoint, lambda run: read_metrics(run / "metrics.jsonl")),
    }.items():
        for number in range(4 * times):
            with copied(RUNS / name, tmp_path / "run") as run:
                path = rng.choice(sorted(path for path in run.rglob("*") if path.is_file()))
                what = f"{number}: {path.relative_to(run)} {damage(path, rng)}"
                for read in (*readers, read_sessions, lambda run: load_recipe(run / "recipe.toml", stored=True)):
                    count.attempt(f"run folder, {name}", what, lambda run=run, read=read: read(run))
    conclude(count, 50, times)


def best(run: Path) -> object:
    return find_checkpoint(run, "best")

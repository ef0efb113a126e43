"""`openvision.train` and `openvision.evaluate`: the commands of these names as functions, e.g. for a notebook.

import openvision
model = openvision.train("recipes/finetune.toml", "mydata", "runs/mine", {"stages.0.samples": 10_000})
numbers = openvision.evaluate("runs/mine")
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.model import Progress
from openvision.evaluation.suites.own import OF_RUNS, suite_of_run
from openvision.evaluation.suites.run import Settings, run_suite
from openvision.recipe.schema import load_recipe
from openvision.runtime import resolve_device, resolve_precision
from openvision.terminal import echo
from openvision.training.setup.start import shape_of
from openvision.training.trainer import launch

Override = str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[float]
"""A value of a recipe key."""


def train(
    recipe: str | os.PathLike[str],
    data: str | os.PathLike[str],
    run: str | os.PathLike[str],
    overrides: Mapping[str, Override] | None = None,
    *,
    force: bool = False,
) -> Path:
    """Train `recipe` on the shards in `data`; the same call resumes an interrupted run. Shows progress.

    Args:
        recipe: a recipe file, e.g. "recipes/finetune.toml".
        data: folder or URL with the shard folders that the recipe names.
        run: folder for checkpoints, metrics and the trained model.
        overrides: values by recipe key, e.g. {"stages.0.batch_size": 64, "run.device": "cuda"}.
        force: resume although recipe or data changed.

    Returns the folder of the trained model, which `openvision.load` reads. Raises OpenVisionError for bad input, and
    `openvision.training.trainer.Interrupted` after Ctrl-C, when the state is saved.
    """
    changes = [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()]
    loaded = load_recipe(Path(recipe), changes, fill=shape_of)
    # A device that is not there is an error before anything is read.
    resolve_precision(loaded.run.precision, resolve_device(loaded.run.device))
    model = launch(loaded, os.fspath(data), Path(run), force)
    return Path(run) / "model" if model is None else model


def evaluate(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    suite: str | None = None,
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a run, a model folder or a released name; numbers by evaluator and metric, accuracies from 0 to 1.

    Args:
        model: any source of `openvision.load`.
        data: folder with the data of the suite; by default the one that the run was trained on.
        suite: a name or TOML file as of `openvision eval`; by default what suits the data of the run.
        output: folder for results; a run keeps those of its own data by default, others go to runs/eval.
        device: as of `openvision.load`.
        batch_size: images per batch.
        progress: receives the images done and their total, for every set that is encoded.

    Results are files as of `openvision eval`, with intervals; after a stop the same call measures what is left.
    """
    where = resolve_device(device)
    source = os.fspath(model)
    chosen, folder = suite_of_run(Path(source), os.fspath(data) if data is not None else None, suite)
    into = Path(output) if output is not None else None if chosen.name in OF_RUNS else Path("runs/eval")
    if batch_size < 1:
        raise OpenVisionError(f"batch_size is {batch_size}; it must be at least 1")
    settings = Settings(batch_size=batch_size, device=str(where))
    (result,) = run_suite([source], chosen, folder, into, settings, say=echo, progress=progress)
    return {name: dict(entry["values"]) for name, entry in result.measured.items()}

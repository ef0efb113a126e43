"""Measure checkpoints by a suite: one folder of results each.

The numbers of each evaluator are written as soon as they are measured: after a stop the same command measures only what
is left.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import measure_all
from openvision.evaluation.evaluators.model import EvaluatedModel, Progress
from openvision.evaluation.report.gallery import write_gallery
from openvision.evaluation.report.labels import label, shown
from openvision.evaluation.suites.results import (
    EVALUATION,
    FORMAT,
    CheckpointFacts,
    Content,
    Entry,
    Result,
    entry,
    file_sha256,
    read_result,
    tensors,
    write_result,
)
from openvision.evaluation.suites.suite import Suite, usable
from openvision.files import JsonObject, make_folder
from openvision.images.native import remark_on_shapes
from openvision.images.preprocess import Preprocessing
from openvision.models.protocols import Model
from openvision.provenance import git_state, library_versions
from openvision.renamed import read_metrics
from openvision.terminal import echo
from openvision.weights.load import Checkpoint, Request, load_checkpoint
from openvision.weights.registry import available_models, released_in

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How checkpoints are measured: part of every result."""

    resolution: int | None = None
    preprocessing: Preprocessing = "crop"
    batch_size: int = 64
    threads: int = 2
    device: str = "cpu"
    bfloat16: bool = False
    """Compute in bfloat16; float32 otherwise."""


def run_suite(
    checkpoints: Sequence[str],
    suite: Suite,
    root: str | Path,
    output: Path | None,
    settings: Settings | None = None,
    request: Request | None = None,
    skip_missing: bool = False,
    say: Say = echo,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
) -> list[Result]:
    """Measure every checkpoint and write OUTPUT/NAME/, or the run's own folder without `output`.

    Raises OpenVisionError before anything is measured where it can.
    """
    settings = settings or Settings()
    suite.present(root, skip_missing)
    sources = [model_of(source) for source in checkpoints]
    names = short_names(sources)
    folders = [output / name if output else _run_of(source) for source, name in zip(sources, names, strict=True)]
    results = []
    # All are opened before the first is measured: a wrong name at the end should not cost hours.
    opened = [load_checkpoint(source, request) for source in sources]
    for name, folder in zip(names, folders, strict=True):
        checkpoint = opened.pop(0)
        say(f"{name}: {checkpoint.source}")
        content = describe(checkpoint, name, suite, root, settings, list(command or sys.argv))
        result = _continued(Result(make_folder(folder), content, {}))
        results.append(_measure(result, evaluated(checkpoint, settings, progress), suite, root, skip_missing, say))
    return results


def model_of(source: str) -> str:
    """The model folder of a run where `source` is the folder of a run; else the source itself."""
    inside = Path(source) / "model"
    return str(inside) if inside.is_dir() else source


def _run_of(source: str) -> Path:
    path = Path(source)
    if path.name != "model":
        raise OpenVisionError(f"{source} is not the folder of a run; give -o FOLDER for its results")
    return path.parent


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """A short name for each: the run's folder for RUN/model; several of one name get numbers."""
    if not checkpoints:
        raise OpenVisionError("give at least one checkpoint to measure")
    found: list[str] = []
    for source in checkpoints:
        path = Path(source)
        base = path.parent.name if path.name == "model" and path.parent.name else path.name or path.resolve().name
        name, number = base.removesuffix(".safetensors"), 2
        while name in found:
            name, number = f"{base}-{number}", number + 1
        found.append(name)
    return found


def evaluated(checkpoint: Checkpoint, settings: Settings, progress: Progress | None = None) -> EvaluatedModel:
    """A checkpoint as evaluators take it, on the device of the settings."""
    whole = whole_model(checkpoint)
    torch_device = torch.device(settings.device)
    for module in (checkpoint.any_model, checkpoint.vision):
        if module is not None:
            module.to(torch_device)
    return EvaluatedModel(
        checkpoint.vision,
        whole,
        checkpoint.tokenizer,
        settings.resolution,
        settings.preprocessing,
        settings.batch_size,
        settings.threads,
        progress=progress,
        autocast=torch.bfloat16 if settings.bfloat16 else None,
    )


def whole_model(checkpoint: Checkpoint) -> Model | None:
    """The model of any kind; None for a vision tower alone."""
    return checkpoint.any_model


def _continued(fresh: Result) -> Result:
    """`fresh` with the numbers of an interrupted measurement of the same."""
    if not (fresh.folder / EVALUATION).is_file():
        return fresh
    try:
        earlier = read_result(fresh.folder)
    except OpenVisionError:
        return fresh
    same = ("checkpoint", "settings", "suite", "git", "data_folder", "libraries")
    if earlier.content["complete"] or any(earlier.content[key] != fresh.content[key] for key in same):
        return fresh
    fresh.content["results"], fresh.tensors = earlier.content["results"], earlier.tensors
    return fresh


def _measure(
    result: Result, model: EvaluatedModel, suite: Suite, root: str | Path, skip_missing: bool, say: Say
) -> Result:
    """Measure what the result does not hold yet."""
    present, notes = suite.present(root, skip_missing)
    chosen, without = usable(present, model.has_text, model.has_decoder, model.preprocessing == "native")
    if not chosen:
        source = result.content["checkpoint"]["source"]
        raise OpenVisionError(f"{source}: suite {suite.name!r} measures nothing on it: {'; '.join(without)}")
    result.content["skipped"] = [*notes, *without]
    if remark := remark_on_shapes(model.vision.config.aspects, model.preprocessing):
        say(remark)
    for note in result.content["skipped"]:
        say(f"  skipped {note}")
    done = result.measured
    left = [one for one in chosen if one.title not in done]
    start = time.perf_counter()
    for evaluator, measured in measure_all(left, model, root):
        found = entry(evaluator, measured, time.perf_counter() - start)
        start = time.perf_counter()
        result.content["results"].append(found)
        result.tensors |= tensors(evaluator, measured)
        write_result(result)
        say(f"  {evaluator.title}: {_line(found)}")
    write_gallery(result.folder, suite.shown(chosen), model, root)
    result.content["complete"] = True
    write_result(result)
    return result


def _line(found: Entry) -> str:
    """The first two numbers of an evaluator, for the terminal."""
    first = list(found["values"].items())[:2]
    return ", ".join(
        f"{label(metric)} {shown(metric, value, found['intervals'].get(metric))}" for metric, value in first
    )


def describe(
    checkpoint: Checkpoint, name: str, suite: Suite, root: str | Path, settings: Settings, command: list[str]
) -> Content:
    """evaluation.json before anything is measured."""
    resolution = settings.resolution or checkpoint.vision.config.image_size
    return {
        "format": FORMAT,
        "complete": False,
        "checkpoint": describe_checkpoint(checkpoint, name),
        "settings": {
            "resolution": resolution,
            "preprocessing": settings.preprocessing,
            "precision": "bfloat16" if settings.bfloat16 else "float32",
            "device": settings.device,
        },
        "suite": {"name": suite.name, "description": suite.description, "sha256": suite.sha256},
        "git": git_state(),
        "command": command,
        "libraries": library_versions(),
        "data_folder": str(root),
        "results": [],
        "skipped": [],
        "history": history(checkpoint.source),
    }


def describe_checkpoint(checkpoint: Checkpoint, name: str) -> CheckpointFacts:
    """What identifies a checkpoint: hash of its weights, its recipe, its provenance, its size."""
    source = Path(checkpoint.source)
    file = source / "model.safetensors" if source.is_dir() else source
    recipe = source / "recipe.toml" if source.is_dir() else source.parent / "recipe.toml"
    whole: torch.nn.Module = checkpoint.any_model or checkpoint.vision
    return {
        "name": name,
        "source": checkpoint.source,
        "sha256": file_sha256(file) if file.is_file() else _weights_sha256(whole),
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        "recipe_sha256": file_sha256(recipe) if recipe.is_file() else None,
        "provenance": checkpoint.provenance,
        "parameters": _size(whole),
        "vision_parameters": _size(checkpoint.vision),
        "released": released_name(checkpoint.source),
    }


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def released_name(source: str) -> str | None:
    """The released model that a source names: a name, a Hub id, or a folder called as one."""
    entry = released_in(source)
    if entry is not None:
        return entry.name
    last = Path(source).name
    return last if last in available_models() else None


def _weights_sha256(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def history(source: str) -> list[JsonObject]:
    """Measurements made while the checkpoint was trained, from the metrics beside it; empty without."""
    file = Path(source).parent / "metrics.jsonl"
    if not file.is_file():
        return []
    return [line for line in read_metrics(file) if line.get("kind") == "eval"]

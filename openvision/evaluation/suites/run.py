"""Measure checkpoints by a suite: one folder of results each, and one page that compares them all.

Each evaluator's numbers are written when they are there: after a stop the same command measures only what is left.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import measure_all
from openvision.evaluation.evaluators.model import Progress, Subject
from openvision.evaluation.report.examples import write_gallery
from openvision.evaluation.suites.artefact import file_sha256
from openvision.evaluation.suites.results import EVALUATION, FORMAT, Result, entry, read_result, tensors, write_result
from openvision.evaluation.suites.suite import Suite, usable
from openvision.files import make_folder
from openvision.images.preprocess import Preprocessing
from openvision.provenance import git_state, library_versions
from openvision.renamed import read_metrics
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
    output: Path,
    settings: Settings | None = None,
    request: Request | None = None,
    skip_missing: bool = False,
    say: Say = print,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
) -> list[Result]:
    """Measure every checkpoint and write OUT/NAME/; raises OpenVisionError before anything is measured where it can."""
    settings = settings or Settings()
    suite.present(root, skip_missing)
    names = short_names(checkpoints)
    results = []
    # All are opened before the first is measured: a wrong name at the end should not cost hours.
    opened = [load_checkpoint(source, request) for source in checkpoints]
    for name in names:
        checkpoint = opened.pop(0)
        say(f"{name}: {checkpoint.source}")
        run = _Run(checkpoint, name, suite, root, output / name, settings, list(command or sys.argv))
        results.append(run.measure(skip_missing, say, progress))
    return results


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


class _Run:
    """One checkpoint on one suite."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        suite: Suite,
        root: str | Path,
        folder: Path,
        settings: Settings,
        command: list[str],
    ) -> None:
        self.checkpoint, self.suite, self.root, self.settings = checkpoint, suite, root, settings
        device = torch.device(settings.device)
        module = checkpoint.model or checkpoint.vision
        self.subject = Subject(
            checkpoint.vision,
            checkpoint.model,
            checkpoint.tokenizer,
            settings.resolution,
            settings.preprocessing,
            settings.batch_size,
            settings.threads,
            autocast=torch.bfloat16 if settings.bfloat16 else None,
        )
        content = {
            "format": FORMAT,
            "complete": False,
            "checkpoint": describe(checkpoint, name),
            "settings": {"resolution": self.subject.pixels, "preprocessing": settings.preprocessing}
            | {"precision": "bfloat16" if settings.bfloat16 else "float32", "device": settings.device},
            "suite": {"name": suite.name, "description": suite.description, "sha256": suite.sha256},
            "git": git_state(),
            "command": command,
            "libraries": library_versions(),
            "data_folder": str(root),
            "results": [],
            "skipped": [],
            "history": history(checkpoint.source),
        }
        module.to(device)
        self.result = self._begun(Result(make_folder(folder), content, {}))

    def _begun(self, fresh: Result) -> Result:
        """What an earlier, interrupted run of the same left."""
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

    def measure(self, skip_missing: bool, say: Say, progress: Progress | None) -> Result:
        present, notes = self.suite.present(self.root, skip_missing)
        chosen = usable(present, self.checkpoint.model is not None)
        if not chosen:
            raise OpenVisionError(
                f"{self.checkpoint.source} has no text tower: suite {self.suite.name!r} measures nothing without one"
            )
        notes += [f"{one.title}: needs a text tower" for one in present if one not in chosen]
        self.result.content["skipped"] = notes
        for note in notes:
            say(f"  skipped {note}")
        self.subject.progress = progress
        done = self.result.measured
        left = [one for one in chosen if one.title not in done]
        start = time.perf_counter()
        for evaluator, measured in measure_all(left, self.subject, self.root):
            found = entry(evaluator, measured) | {"seconds": round(time.perf_counter() - start, 1)}
            start = time.perf_counter()
            self.result.content["results"].append(found)
            self.result.tensors |= tensors(evaluator, measured)
            write_result(self.result)
            say(f"  {evaluator.title}: {_line(found)}")
        write_gallery(self.result, chosen, self.subject, self.root)
        self.result.content["complete"] = True
        write_result(self.result)
        return self.result


def _line(found: dict[str, Any]) -> str:
    """The first two numbers of an evaluator, for the terminal."""
    parts = []
    for metric, value in list(found["values"].items())[:2]:
        low, high = found["intervals"].get(metric, (value, value))
        parts.append(f"{metric} {100 * value:.1f} % ({100 * low:.1f}-{100 * high:.1f})")
    return ", ".join(parts)


def describe(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """What identifies a checkpoint: hash of its weights, its recipe, where it came from, its size."""
    source = Path(checkpoint.source)
    file = source / "model.safetensors" if source.is_dir() else source
    recipe = source / "recipe.toml" if source.is_dir() else source.parent / "recipe.toml"
    whole = checkpoint.model or checkpoint.vision
    return {
        "name": name,
        "source": checkpoint.source,
        "sha256": file_sha256(file) if file.is_file() else _weights_sha256(whole),
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        "recipe_sha256": file_sha256(recipe) if recipe.is_file() else None,
        "provenance": checkpoint.provenance,
        "parameters": sum(parameter.numel() for parameter in whole.parameters()),
        "vision_parameters": sum(parameter.numel() for parameter in checkpoint.vision.parameters()),
        "released": released_name(checkpoint.source),
    }


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


def history(source: str) -> list[dict[str, Any]]:
    """Measurements made while the checkpoint was trained, from the metrics beside it; empty without."""
    file = Path(source).parent / "metrics.jsonl"
    if not file.is_file():
        return []
    return [line for line in read_metrics(file) if line.get("kind") == "eval"]

"""The card of a model: the Hub's metadata, and what is known of data, recipe, cost, evaluation, limits and licence.

All is read from the files beside the weights; what is not known is said to be unknown. Texts of files stay on one line.
"""

import tomllib
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, read_json, read_text
from openvision.untrusted import one_line

_UNKNOWN = "Not known: the weights came without a record of their training."
_SHOWN = 12
"""Numbers of an evaluation that a card shows."""


def front_matter(task: str) -> str:
    """Metadata in YAML as the Hub reads it; `task` is the Hub's name of a pipeline."""
    return f"""---
library_name: openvision
pipeline_tag: {task}
license: other
license_name: not-stated
tags:
- openvision
- vision
---
"""


def task_of(has_text: bool, captions: bool) -> str:
    """The Hub's name for what a model does."""
    if has_text:
        return "zero-shot-image-classification"
    return "image-to-text" if captions else "image-feature-extraction"


def training_sections(provenance: JsonObject, folder: Path | None) -> str:
    """Markdown sections; `folder` is the model folder, RUN/model of a run, or None."""
    recipe = _recipe(folder)
    return f"""## Data

{_data(provenance, recipe)}

## Recipe

{_stages(provenance, recipe)}

## Cost

{_cost(provenance)}

## Evaluation

{_evaluation(folder)}

## Limits

An encoder repeats what its images and texts associate, prejudice included. Zero-shot probabilities say which label fits
best, not whether any does. Measure it on images like yours before you rely on it.

## Licence

The code is Apache-2.0. No licence is stated for these weights: whoever publishes them states it here and in the
metadata above, and the licences of the training images may bind it.
"""


def _recipe(folder: Path | None) -> JsonObject:
    file = folder / "recipe.toml" if folder is not None else None
    if file is None or not file.is_file():
        return {}
    try:
        return tomllib.loads(read_text(file))
    except (OpenVisionError, ValueError, RecursionError):
        return {}


def _data(provenance: JsonObject, recipe: JsonObject) -> str:
    if "data_manifest_sha256" not in provenance:
        source = provenance.get("converted_from") or provenance.get("saved_from")
        return f"Converted from {_quoted(source)}; see its own card." if source else _UNKNOWN
    data = recipe.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    named = f"Shards {_quoted(train)}, manifest" if isinstance(train, str) else "Shards with the manifest"
    return f"{named} SHA-256 {_quoted(provenance['data_manifest_sha256'])}."


def _stages(provenance: JsonObject, recipe: JsonObject) -> str:
    if not recipe:
        return _UNKNOWN
    lines = [
        f"{_quoted(recipe.get('name', 'a recipe'))} (recipe.toml of the run), seed {_quoted(provenance.get('seed'))}:"
    ]
    stages = recipe.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict):
            shown = {key: stage.get(key) for key in ("resolution", "samples", "batch_size", "base_learning_rate")}
            lines.append("- " + ", ".join(f"{key} {_quoted(value)}" for key, value in shown.items()))
    git = provenance.get("git")
    if isinstance(git, dict):
        lines.append(f"- code at commit {_quoted(git.get('commit'))}")
    return "\n".join(lines)


def _cost(provenance: JsonObject) -> str:
    facts = {
        "samples_seen": "samples",
        "wall_clock_seconds": "seconds of wall clock",
        "energy_kwh": "kWh",
        "training_tflops": "TFLOPs",
    }
    known = [f"{_quoted(provenance[key])} {unit}" for key, unit in facts.items() if key in provenance]
    if not known:
        return _UNKNOWN
    machine = provenance.get("machine")
    where = (machine.get("accelerator") or machine.get("processor")) if isinstance(machine, dict) else None
    method = provenance.get("energy_method")
    return ", ".join(known) + f" on {_quoted(where)}." + (f" Energy: {one_line(str(method))}." if method else "")


def _evaluation(folder: Path | None) -> str:
    file = folder.parent / "evaluation.json" if folder is not None else None
    if file is None or not file.is_file():
        return "Not measured yet; `openvision eval` does."
    try:
        results = read_json(file).get("results")
    except OpenVisionError:
        results = None
    rows = [
        f"| {_quoted(entry.get('name')).replace('|', '/')} | {_quoted(metric).replace('|', '/')} | {value:.4g} |"
        for entry in (results if isinstance(results, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("values"), dict)
        for metric, value in entry["values"].items()
        if isinstance(value, (int, float))
    ]
    if not rows:
        return "The results beside this model cannot be read; `openvision eval` measures it again."
    return "\n".join(["| set | metric | value |", "|---|---|---:|", *rows[:_SHOWN]])


def _quoted(value: object) -> str:
    return f"`{one_line(str(value)).replace('`', chr(39)):.120}`"

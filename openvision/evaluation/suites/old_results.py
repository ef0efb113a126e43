"""Results written before December 2026, translated to the format of today when they are read.

- evaluation.json of a run held `sets` of rows (chance, majority, pixel neighbours, model) with Wilson intervals.
- Images were called pictures, and an image in a gallery had its key for a name.
"""

from pathlib import Path

from openvision.evaluation.suites.suite import HELD_OUT, title_on
from openvision.files import JsonObject

_ROWS = {
    "majority": "majority_",
    "pixel neighbour, k = 1": "pixels1_",
    "pixel neighbour, k = 10": "pixels10_",
    "chance": "chance_",
}
# Name of an evaluator of the suite -> how its metrics began in the old file.
_PREFIXES = {"alt-texts": "alt_", "first sentences": "sentence_", "groups": "category_", "names": ""}
_KINDS = {
    "names": "zero_shot",
    "groups": "zero_shot",
    "name retrieval": "retrieval",
    "alt-texts": "retrieval",
    "first sentences": "retrieval",
}
_WORDS = {"picture": "image", "pictures": "images", "key": "name"}


def renamed(content: JsonObject) -> JsonObject:
    """The same object with the keys of today, at every depth."""

    def walk(value: object) -> object:
        if isinstance(value, dict):
            return {_WORDS.get(key, key): walk(one) for key, one in value.items()}
        return [walk(one) for one in value] if isinstance(value, list) else value

    return {_WORDS.get(key, key): walk(value) for key, value in content.items()}


def translate_held_out(old: JsonObject, folder: Path, form: str) -> JsonObject:
    """The old evaluation of a run as a result of the suite `heldout`, without outcomes of single images."""
    artefact, protocol = old["artefact"], old["protocol"]
    return {
        "format": form,
        "complete": True,
        "checkpoint": {
            "name": folder.name,
            "source": str(folder / "model"),
            "sha256": artefact["checkpoint_sha256"],
            "recipe": None,
            "recipe_sha256": artefact["recipe_sha256"],
            "provenance": old.get("training", {}),
            "parameters": None,
            "vision_parameters": None,
            "released": None,
        },
        "settings": {"resolution": protocol["resolution"], "preprocessing": "crop", "intervals": "Wilson score"},
        "suite": {"name": HELD_OUT, "description": "held-out sets, measured by an earlier version", "sha256": ""},
        "git": artefact["git"],
        "command": artefact["command"],
        "libraries": artefact["libraries"],
        "data_folder": "",
        "results": [
            entry
            for data, rows in old["sets"].items()
            for entry in _entries(data, rows, protocol["templates"], artefact["data_manifest_sha256"])
        ],
        "skipped": [],
        "history": [],
    }


def _entries(data: str, rows: JsonObject, templates: list[str], manifests: dict[str, str]) -> list[JsonObject]:
    """An entry for each evaluator that measured the model, and one for its baselines."""
    found: dict[str, JsonObject] = {}
    for row, values in rows.items():
        for key, value in values.items():
            if not isinstance(value, float):
                continue
            name, prefix = next((name, prefix) for name, prefix in _PREFIXES.items() if key.startswith(prefix))
            name = "name retrieval" if name == "names" and "_r" in key else name
            title = name if row == "model" else f"baselines, {name.replace('name retrieval', 'names')}"
            entry = found.setdefault(title, {"values": {}, "intervals": {}})
            metric = _ROWS.get(row, "") + key.removeprefix(prefix)
            entry["values"][metric] = value
            if f"{key}_ci" in values:
                entry["intervals"][metric] = values[f"{key}_ci"]
    model = rows["model"]
    facts = {"images": model["pictures"], "classes": model["candidates"], "rejected": model.get("rejected", 0)}
    details = {"top1_by_group": model["top1_by_category"]} if "top1_by_category" in model else {}
    return [
        {
            "name": title_on(data, title),
            "kind": _KINDS.get(title, "baselines"),
            "options": {"data": data},
            "reported": {},
            "open_clip": {},
            **own,
            "facts": {**facts, "prompts": "; ".join(templates)},
            "details": details if title == "names" else {},
            "data": {name: manifests[name] for name in (data, "train") if name in manifests},
        }
        for title, own in found.items()
    ]

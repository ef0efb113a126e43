"""Names that stored files may still use: recipe keys and metrics that were renamed.

A recipe that a person writes must use the new name, and the error says which. Recipes that a run wrote (recipe.toml of
run and model folders) and metrics.jsonl are translated when they are read.
"""

from collections.abc import Iterator
from pathlib import Path

from openvision.files import JsonObject, check_file, read_json_lines

RENAMED_KEYS = {
    "stages.accumulate": "micro_batches",
    "augment.crop_law": "crop_sampling",
    "parallel.start_seconds": "start_timeout_seconds",
    "parallel.step_seconds": "step_timeout_seconds",
}
"""Old recipe key, dotted and without the numbers of tables in an array -> its new name in the same table."""

RENAMED_METRICS = {"temperature": "logit_scale", "pictures": "images"}
"""Old name of a number in metrics.jsonl -> new name."""

RENAMED_REASONS = {"another_picture": "another_image"}
"""Old reason in the report of a shard that was joined with the recaption table -> new reason."""


def new_key(place: str) -> str | None:
    """New name of the recipe key at `place`, e.g. `stages.0.accumulate`; None for a key that was not renamed."""
    return RENAMED_KEYS.get(".".join(part for part in place.split(".") if not part.isdigit()))


def translate_recipe(recipe: JsonObject) -> None:
    """Give the keys of a stored recipe their new names, in place."""
    for old, new in RENAMED_KEYS.items():
        *parents, last = old.split(".")
        for table in _tables(recipe, parents):
            if last in table:
                table[new] = table.pop(last)


def read_metrics(path: Path) -> list[JsonObject]:
    """Lines of metrics.jsonl under the names of today; raises OpenVisionError when the file cannot be read."""
    if path.exists():
        check_file(path)
    return [{RENAMED_METRICS.get(name, name): value for name, value in line.items()} for line in read_json_lines(path)]


def _tables(table: JsonObject, parents: list[str]) -> Iterator[JsonObject]:
    """The table at the place `parents`, or each table where an array stands there."""
    if not parents:
        yield table
        return
    found = table.get(parents[0], {})
    for each in found if isinstance(found, list) else [found]:
        if isinstance(each, dict):
            yield from _tables(each, parents[1:])

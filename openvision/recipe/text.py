"""The text of a recipe: --set overrides, error messages that suggest a key, remarks in comments.

A value that differs from the papers, or that they do not give, carries a remark on its line; a table, on its header:

    warmup_samples = 0  # not published; ours: the third stage of version 1 has none
    precision = "bfloat16"  # published: float32; ours: several times as fast, and what version 1 ran in
"""

import difflib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from openvision.errors import OpenVisionError, describe_value
from openvision.files import JsonObject
from openvision.renamed import new_key

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_.-]+)\s*=")
_REMARK = re.compile(r"#\s*((?:not published|published:[^;]*); ours: .+?)\s*$")


@dataclass(frozen=True)
class Remark:
    """Comment on the source of a value."""

    place: str
    """Dotted key, e.g. `stages.2.warmup_samples`."""
    text: str
    """Begins with "not published" or "published: ..."."""


def remarks(text: str) -> list[Remark]:
    """Remarks of a recipe, in order: the values and tables that are not taken from a paper."""
    found = [(place, _REMARK.search(line)) for place, line in places(text) if place]
    return [Remark(place, match[1]) for place, match in found if match]


def places(text: str) -> Iterator[tuple[str, str]]:
    """(dotted key, line) for every line: key of the table it opens or the value it sets, else "".

    Tables of an array are numbered: `stages.0`.
    """
    table = ""
    counts: dict[str, int] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            table = header[2]
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = f"{table}.{counts[table]}"
            yield table, line
        elif key := _KEY.match(line):
            yield f"{table}.{key[1]}".lstrip("."), line
        else:
            yield "", line


def flatten(value: object, place: str = "") -> JsonObject:
    """Dotted key -> value for every leaf of nested tables; an array of values is a leaf, an array of tables is not."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {place: value}
    leaves: JsonObject = {}
    for key, item in value.items():
        leaves |= flatten(item, f"{place}.{key}".lstrip("."))
    return leaves


def apply_override(data: JsonObject, override: str) -> None:
    """Apply `key.path=value`, the value in TOML syntax; a bare word is a string, `none` removes the key.

    Raises OpenVisionError for another form or a key path that does not exist.
    """
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise OpenVisionError(f"--set {override!r} is not of the form key=value, e.g. --set stages.0.batch_size=64")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value
    *parents, last = path.split(".")
    node: dict | list = data
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if isinstance(node, list):
            node[int(last)] = parsed
        elif parsed == "none":
            node.pop(last, None)
        else:
            node[last] = parsed
    except (ValueError, IndexError, TypeError, AttributeError):
        raise OpenVisionError(f"--set {override!r}: the recipe has no key {path}") from None


def describe_problems(error: ValidationError, schema: JsonObject, kinds: dict[str, str]) -> str:
    """What is wrong with a recipe, in one line; `kinds` as in `known_keys`."""
    problems = error.errors()
    # A list whose items are wrong counts as too short, too: it lacks nothing else.
    within = {problem["loc"][:end] for problem in problems for end in range(len(problem["loc"]))}
    told = [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in within]
    return "; ".join(describe_problem(problem, schema, kinds) for problem in told)


def describe_problem(problem: ErrorDetails, schema: JsonObject, kinds: dict[str, str]) -> str:
    """A pydantic error in one sentence, with the key and the remedy; `kinds` as in `known_keys`."""
    location = problem["loc"]
    place = ".".join(str(part) for part in location if part not in kinds)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        if new := new_key(place):
            return f"unknown key {place}: it was renamed, write {new}"
        return f"unknown key {place}{_suggestion(location, schema, kinds)}"
    if problem["type"] == "missing":
        return f"key {place} is missing"
    if problem["type"] == "union_tag_invalid":
        return f"{place}.kind is {problem.get('ctx', {}).get('tag')!r}; choose one of {', '.join(kinds)}"
    message = describe_value(problem["type"], problem["input"], problem.get("ctx", {}), problem["msg"])
    return f"{place}: {message}" if place else message


def _suggestion(location: tuple[int | str, ...], schema: JsonObject, kinds: dict[str, str]) -> str:
    known = known_keys(location[:-1], schema, kinds)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f" (did you mean {near[0]}?)" if near else (f" (known: {', '.join(known)})" if known else "")


def known_keys(parents: tuple[int | str, ...], schema: JsonObject, kinds: dict[str, str]) -> list[str]:
    """Keys of the table at `parents`, from the recipe's JSON schema.

    `kinds` maps a kind of model, which pydantic inserts into the location of an error, to its definition in the schema.
    """
    node, definitions = schema, schema["$defs"]
    for key in parents:
        if key in kinds:
            node = definitions[kinds[str(key)]]
            continue
        if isinstance(key, int):
            # An optional list of tables has its items below `anyOf`.
            lists = (choice["items"] for choice in [node, *node.get("anyOf", [])] if "items" in choice)
            node = next(lists, {})
        else:
            node = node.get("properties", {}).get(key, {})
        choices = [node, *node.get("anyOf", []), *node.get("allOf", [])]
        reference = next((choice["$ref"] for choice in choices if "$ref" in choice), None)
        if reference:
            node = definitions[reference.rsplit("/", 1)[-1]]
    return sorted(node.get("properties", {}))

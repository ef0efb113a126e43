"""Suites: named lists of evaluators, from the folder `shipped` or from any TOML file of the same form.

description = "what it measures"
sets = ["a", "b"]        # optional: every evaluator without `data` is measured on each of these
notes = ["..."]          # optional: what a reader of the numbers must know
[[evaluate]]
kind = "zero_shot"
data = "imagenet/val"
"""

import hashlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import Evaluator, parse_evaluators

HELD_OUT, HELD_OUT_SCENES, OWN = "heldout", "heldout_scenes", "own"
SUITES = (HELD_OUT, HELD_OUT_SCENES, "quick", "scenes", "paper")
_KEYS = ("description", "sets", "notes", "evaluate")


@dataclass(frozen=True)
class Suite:
    """A named list of evaluators."""

    name: str
    description: str
    evaluators: list[Evaluator]
    sha256: str
    """SHA-256 of the file's text and of what was changed in it on the command line."""
    sets: tuple[str, ...] = ()
    """Data sets that every evaluator is measured on; empty where each evaluator names its own."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know of the data."""

    def present(self, root: str | Path, skip_missing: bool) -> tuple[list[Evaluator], list[str]]:
        """Evaluators whose data exist, and what is missing for the others.

        Raises OpenVisionError that lists what is missing, unless all of it may be skipped and something is left.
        """
        found: list[Evaluator] = []
        missing: dict[str, list[str]] = {}
        for one in self.evaluators:
            if (path := one.missing(root)) is None:
                found.append(one)
            else:
                missing.setdefault(path, []).append(one.title)
        notes = []
        for path, titles in missing.items():
            more = f" and {len(titles) - 1} more" if len(titles) > 1 else ""
            notes.append(f"{titles[0]}{more}: {path} is missing")
        optional = skip_missing or {title for titles in missing.values() for title in titles} <= self.optional
        if missing and (not optional or not found):
            remedy = "" if not found else "; --skip-missing measures the others"
            raise OpenVisionError(f"suite {self.name!r} lacks data below {root}: {'; '.join(notes)}{remedy}")
        return found, notes

    @property
    def optional(self) -> set[str]:
        """Titles of the evaluators that are left out where their data are missing."""
        return {one.title for one in self.evaluators if one.optional}

    def shown(self, evaluators: Sequence[Evaluator]) -> list[Evaluator]:
        """Evaluators whose images the gallery shows: of several `sets` the first."""
        return [one for one in evaluators if not self.sets or one.data == self.sets[0]]

    def with_prompts(self, templates: Sequence[str]) -> "Suite":
        """The same suite with other prompt templates for names."""
        changed = [
            one.model_copy(update={"prompts": tuple(templates)}) if getattr(one, "prompts", None) is not None else one
            for one in self.evaluators
        ]
        digest = hashlib.sha256(f"{self.sha256} {list(templates)}".encode()).hexdigest()
        return replace(self, evaluators=changed, sha256=digest)


def load_suite(name: str) -> Suite:
    """A suite by its name or its file; raises OpenVisionError for one that is unknown, broken or empty."""
    if name in SUITES:
        text = resources.files("openvision.evaluation.suites").joinpath("shipped", f"{name}.toml").read_text("utf-8")
    else:
        text = _read(name)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OpenVisionError(f"suite {name} is not valid TOML: {error}") from error
    if unknown := sorted(content.keys() - set(_KEYS)):
        raise OpenVisionError(f"suite {name}: unknown key {unknown[0]} (known: {', '.join(_KEYS)})")
    tables, sets, notes = (content.get(key, []) for key in ("evaluate", "sets", "notes"))
    if not isinstance(tables, list):
        raise OpenVisionError(f"suite {name}: `evaluate` must be tables, written [[evaluate]]")
    if not isinstance(sets, list) or not all(isinstance(one, str) for one in sets):
        raise OpenVisionError(f"suite {name}: `sets` must be a list of data folders")
    if not isinstance(notes, list) or not all(isinstance(one, str) for one in notes):
        raise OpenVisionError(f"suite {name}: `notes` must be a list of sentences")
    title = name if name in SUITES else Path(name).stem
    evaluators = parse_evaluators(_on_each(tables, sets), f"suite {name}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Suite(title, str(content.get("description", "")), evaluators, digest, tuple(sets), tuple(notes))


def title_on(data: str, name: str) -> str:
    """The name of an evaluator of a suite with `sets`, measured on one of them."""
    return f"{data}, {name}"


def _on_each(tables: list[object], sets: list[str]) -> list[object]:
    """Tables without `data`, once for each of `sets`; the others as they are."""
    found: list[object] = []
    for data in sets:
        for table in tables:
            if isinstance(table, dict) and "data" not in table:
                name = str(table.get("name") or table.get("kind"))
                found.append({**table, "name": title_on(data, name), "data": data})
    return found + [table for table in tables if not sets or (isinstance(table, dict) and "data" in table)]


def _read(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise OpenVisionError(f"suite {name!r} is neither {', '.join((*SUITES, OWN))} nor a TOML file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OpenVisionError(f"suite {name} cannot be read: {error}") from error


def usable(
    evaluators: Sequence[Evaluator], has_text: bool, has_decoder: bool, native: bool = False
) -> tuple[list[Evaluator], list[str]]:
    """Evaluators that can be measured on a model with these parts, or on native shapes, and why the others cannot."""
    notes = []
    for one in evaluators:
        if one.needs_text and not has_text:
            notes.append((one, f"{one.title}: needs a text tower"))
        elif one.needs_decoder and not has_decoder:
            notes.append((one, f"{one.title}: needs a caption decoder"))
        elif one.needs_one_grid and native:
            notes.append((one, f"{one.title}: compares patches of one grid; measure it without --native"))
    left_out = [one for one, _ in notes]
    return [one for one in evaluators if one not in left_out], [note for _, note in notes]

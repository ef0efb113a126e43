"""Suites: named lists of evaluators. Those that come along lie in `suites/`; any TOML file of the same form will do.

description = "what it measures"
[[evaluate]]
kind = "zero_shot"
data = "imagenet/val"
"""

import hashlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import Evaluator, parse_evaluators

SUITES = ("quick", "paper")


@dataclass(frozen=True)
class Suite:
    """What is to be measured."""

    name: str
    description: str
    evaluators: list[Evaluator]
    sha256: str
    """Of the file's text."""

    def present(self, root: str | Path, skip_missing: bool) -> tuple[list[Evaluator], list[str]]:
        """Evaluators whose data are there, and what is missing for the others.

        Raises OpenVisionError that lists what is missing, unless it may be skipped and something is left.
        """
        missing = {one.title: path for one in self.evaluators if (path := one.missing(root)) is not None}
        found = [one for one in self.evaluators if one.title not in missing]
        notes = [f"{title}: {path} is missing" for title, path in missing.items()]
        if missing and (not skip_missing or not found):
            remedy = "" if not found else "; --skip-missing measures the others"
            raise OpenVisionError(f"suite {self.name!r} lacks data below {root}: {'; '.join(notes)}{remedy}")
        return found, notes


def load_suite(name: str) -> Suite:
    """A suite by its name or its file; raises OpenVisionError for one that is unknown, broken or empty."""
    if name in SUITES:
        text = resources.files("openvision.evaluation.suites").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    else:
        text = _read(name)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OpenVisionError(f"suite {name} is not valid TOML: {error}") from error
    if unknown := sorted(content.keys() - {"description", "evaluate"}):
        raise OpenVisionError(f"suite {name}: unknown key {unknown[0]} (known: description, evaluate)")
    tables = content.get("evaluate", [])
    if not isinstance(tables, list):
        raise OpenVisionError(f"suite {name}: `evaluate` must be tables, written [[evaluate]]")
    title = name if name in SUITES else Path(name).stem
    evaluators = parse_evaluators(tables, f"suite {name}")
    return Suite(title, str(content.get("description", "")), evaluators, hashlib.sha256(text.encode()).hexdigest())


def _read(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise OpenVisionError(f"suite {name!r} is neither {', '.join(SUITES)} nor a TOML file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OpenVisionError(f"suite {name} cannot be read: {error}") from error


def usable(evaluators: Sequence[Evaluator], has_text: bool) -> list[Evaluator]:
    """Those that can be measured on a model with, or without, a text tower."""
    return [one for one in evaluators if has_text or not one.needs_text]

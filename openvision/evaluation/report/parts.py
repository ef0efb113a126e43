"""What both pages are made of: tables, charts in two themes, examples, provenance. The templates are in parts.html."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from openvision.evaluation.report import figures
from openvision.evaluation.report.gallery import Found, Gallery, Map, Query, Shown
from openvision.evaluation.suites.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """A number in a table."""

    text: str
    value: float | str
    """What the column sorts by."""
    mark: str = ""
    """Class of the style sheet: "best", "worse", "tie", "off", "ours"."""
    title: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """A table that sorts by a click."""

    first: str
    """Head of the column of names."""
    columns: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Answer:
    """What one checkpoint found for a text."""

    name: str
    place: int
    found: list[Found]


@dataclass(frozen=True)
class Asked:
    """A text with the right image and what each checkpoint found."""

    text: str
    right: str
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True)
class Maps:
    """An image beside the maps of each checkpoint; None where one has none."""

    text: str
    image: str
    maps: list[str | None]


def chart(draw: "Callable[..., Figure]", *values: object, dpi: int = 160) -> dict[str, str]:
    """A figure as data URIs by theme."""
    return {theme.name: png_uri(figures.to_png(draw(*values, theme), dpi)) for theme in (figures.LIGHT, figures.DARK)}


def png_uri(png: bytes) -> str:
    """A PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def shown_by(galleries: Sequence[Gallery], evaluator: str) -> list[Shown]:
    """What the evaluator shows in each gallery."""
    return [gallery["evaluators"].get(evaluator, {}) for gallery in galleries]


def asked(names: Sequence[str], queries: Sequence[Sequence[Query]]) -> list[Asked]:
    """Queries of several checkpoints, merged by text: they are the same for all, drawn by lot."""
    merged: dict[str, Asked] = {}
    for name, own in zip(names, queries, strict=True):
        for query in own:
            one = merged.setdefault(query["text"], Asked(query["text"], query["right"]))
            one.answers.append(Answer(name, query["place"], query["found"]))
    return list(merged.values())


def side_by_side(lists: Sequence[Sequence[Map]]) -> list[Maps]:
    """Maps of the same image from every checkpoint; checkpoints may see it at other resolutions."""
    rows = []
    for index in range(max((len(one) for one in lists), default=0)):
        first = next(one[index] for one in lists if index < len(one))
        maps = [one[index]["map"] if index < len(one) else None for one in lists]
        rows.append(Maps(first.get("text", ""), first["image"], maps))
    return rows


def provenance(result: Result) -> list[tuple[str, str]]:
    """What is needed to compute the numbers again."""
    content = result.content
    checkpoint = content["checkpoint"]
    command = " ".join(Path(word).name if index == 0 else word for index, word in enumerate(content["command"]))
    data = {place: identity for entry in content["results"] for place, identity in entry["data"].items()}
    return [
        ("checkpoint", checkpoint["source"]),
        ("weights, SHA-256", checkpoint["sha256"]),
        ("recipe, SHA-256", checkpoint["recipe_sha256"] or "no recipe with these weights"),
        ("commit of the code", (content["git"] or {}).get("commit") or "not a git checkout"),
        ("command", command),
        ("libraries", ", ".join(f"{name} {found}" for name, found in content["libraries"].items())),
        ("settings", ", ".join(f"{name} {value}" for name, value in content["settings"].items())),
        ("suite, SHA-256", content["suite"]["sha256"] or content["suite"]["description"]),
        *((f"data {place}, SHA-256", identity) for place, identity in data.items()),
    ]

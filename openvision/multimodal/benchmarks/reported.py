"""What the papers report on the benchmarks, as data (reported.json): for "ours / reported"."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Reported:
    """A published cell."""

    table: str
    """Framework and language model, and the paper with its table."""
    model: str
    value: str
    """In the unit of the benchmark: percent, OCRBench points, MME perception/cognition."""


@cache
def tables() -> list[dict[str, Any]]:
    """Every table: title, source, framework, llm, and rows of a model and its scores by benchmark."""
    return json.loads(files("openvision.multimodal.benchmarks").joinpath("reported.json").read_text(encoding="utf-8"))[
        "tables"
    ]


def find_reported(benchmark: str, text: str) -> list[Reported]:
    """Rows that report `benchmark` and have `text`, in any case, in table or model."""
    found = []
    for table in tables():
        where = f"{table['title']} ({table['source']})"
        for row in table["rows"]:
            if benchmark in row["scores"] and text.lower() in f"{where} {row['model']}".lower():
                found.append(Reported(where, row["model"], _written(row["scores"][benchmark])))
    return found


def _written(score: float | dict[str, float]) -> str:
    if isinstance(score, dict):
        return "/".join(f"{value:g}" for value in score.values())
    return f"{score:g}"

"""Published numbers: tables of papers as TOML, and whether a reproduction agrees with them.

[[table]]
title = "what was measured"
source = "paper and table"
columns = ["imagenet_top1", "coco_t2i_r1"]      # "mme.perception" is one of several numbers of a benchmark
[table.rows]
openvision-vit-tiny-patch16-160 = [46.9, nan]   # nan was not published
"""

import functools
import math
import tomllib
from dataclasses import dataclass
from importlib import resources

from openvision.evaluation.suites.results import Entry

# Papers print one digit after the point.
_HALF_DIGIT = 0.05


@dataclass(frozen=True)
class PublishedTable:
    """A table of a paper."""

    title: str
    source: str
    rows: dict[str, dict[str, float]]
    """Model -> column -> number, without those that were not published."""


@dataclass(frozen=True)
class Reproduction:
    """A published number beside ours, both in percent."""

    value: float
    ours: float
    low: float
    high: float

    @property
    def agrees(self) -> bool:
        """Whether the published number, in its rounding, lies in our 95 % interval."""
        return self.low - _HALF_DIGIT <= self.value <= self.high + _HALF_DIGIT


@functools.cache
def published_tables(package: str = "openvision.evaluation.suites") -> list[PublishedTable]:
    """The tables of reported.toml in a package."""
    content = tomllib.loads(resources.files(package).joinpath("reported.toml").read_text(encoding="utf-8"))
    tables = []
    for table in content["table"]:
        rows = {
            model: {
                column: float(value)
                for column, value in zip(table["columns"], values, strict=True)
                if not math.isnan(value)
            }
            for model, values in table["rows"].items()
        }
        tables.append(PublishedTable(table["title"], table["source"], rows))
    return tables


def reported(model: str, column: str) -> float | None:
    """The published number of a released model in percent, e.g. `imagenet_top1`; None where none was published."""
    return next((value for table in published_tables() if (value := table.rows.get(model, {}).get(column))), None)


def beside(model: str | None, measured: Entry, metric: str) -> Reproduction | None:
    """Our number of one metric of an evaluator's entry beside the published one, where there is one.

    Both are only comparable when all images were measured at the model's own resolution: a limited run is not.
    """
    name = measured["reported"].get(metric)
    if model is None or name is None or measured["options"].get("limit") is not None:
        return None
    value = reported(model, name)
    if value is None:
        return None
    ours = 100 * measured["values"][metric]
    low, high = (100 * bound for bound in measured["intervals"].get(metric, (ours / 100, ours / 100)))
    return Reproduction(value, ours, low, high)

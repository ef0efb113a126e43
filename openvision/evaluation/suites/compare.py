"""Which of two checkpoints is better, and whether that is noise.

Every metric that is a mean over images is compared by a paired bootstrap on the same images. Many metrics are
compared at once, so p-values are corrected by Holm's method before anything is called a difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from openvision.evaluation.metrics.bootstrap import Difference, difference
from openvision.evaluation.suites.results import Entry, Result

ALPHA = 0.05


@dataclass(frozen=True)
class Row:
    """One metric of one evaluator, of both checkpoints."""

    evaluator: str
    metric: str
    first: float
    second: float
    difference: Difference
    corrected_p: float = 1.0
    """Holm's correction over all rows of the comparison."""

    @property
    def differs(self) -> bool:
        """Whether the difference is more than noise."""
        return self.corrected_p < ALPHA and self.difference.significant


@dataclass(frozen=True)
class Comparison:
    """All that two results have in common."""

    first: str
    second: str
    rows: list[Row]
    left_out: list[str]
    """Evaluators that cannot be compared, and why."""

    def verdict(self) -> str:
        """One sentence for a person."""
        if not self.rows:
            return f"{self.first} and {self.second} have nothing in common that could be compared"
        better = [row for row in self.rows if row.differs and row.difference.value > 0]
        worse = [row for row in self.rows if row.differs and row.difference.value < 0]
        total = len(self.rows)
        if better and not worse:
            return f"{self.first} is better: on {len(better)} of {total} metrics by more than noise, on none worse"
        if worse and not better:
            return f"{self.second} is better: on {len(worse)} of {total} metrics by more than noise, on none worse"
        if better and worse:
            return (
                f"neither is better throughout: {self.first} wins {len(better)} of {total} metrics by more than noise, "
                f"{self.second} {len(worse)}"
            )
        return f"no difference beyond noise on any of {total} metrics"


def compare(first: Result, second: Result) -> Comparison:
    """Compare metric by metric; evaluators on other images or with other options are left out and listed."""
    rows: list[Row] = []
    left_out: list[str] = []
    for name, ours in first.measured.items():
        theirs = second.measured.get(name)
        if theirs is None:
            left_out.append(f"{name}: not measured on {second.name}")
        elif (reason := _differs(ours, theirs)) is not None:
            left_out.append(f"{name}: {reason}")
        else:
            rows += _rows(first, second, name)
    left_out += [f"{name}: not measured on {first.name}" for name in second.measured if name not in first.measured]
    return Comparison(first.name, second.name, holm(rows), left_out)


def _differs(ours: Entry, theirs: Entry) -> str | None:
    if set(ours["data"].values()) != set(theirs["data"].values()):
        return "measured on different data"
    if ours["options"] != theirs["options"]:
        return "measured with different options"
    return None


def _rows(first: Result, second: Result, name: str) -> list[Row]:
    rows = []
    for metric, value in first.measured[name]["values"].items():
        ours, theirs = first.outcomes(name, metric), second.outcomes(name, metric)
        if ours is None or theirs is None or len(ours.values) != len(theirs.values):
            continue
        found = difference(ours, theirs)
        rows.append(Row(name, metric, value, second.measured[name]["values"][metric], found))
    return rows


def holm(rows: Sequence[Row]) -> list[Row]:
    """The same rows with their p-values corrected for their number."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].difference.p)
    corrected = dict.fromkeys(order, 1.0)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(rows) - rank) * rows[index].difference.p))
        corrected[index] = highest
    return [replace(row, corrected_p=corrected[index]) for index, row in enumerate(rows)]

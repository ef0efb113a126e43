"""The held-out evaluation as people read it: for each set the model beside the training-free baselines.

The numbers are those of the suites `heldout` and `heldout_scenes`, or of `own` (own.py) for a run on other data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from openvision.evaluation.suites.own import suite_of_run
from openvision.evaluation.suites.results import Entry, Result, file_sha256, read_result
from openvision.evaluation.suites.run import Settings, run_suite
from openvision.evaluation.suites.suite import Suite, title_on

MODEL = "model"
# Name of an evaluator of the suite -> what its metrics are called beside those of the others.
PREFIXES = {
    "names": "",
    "name retrieval": "",
    "alt-texts": "alt_",
    "first sentences": "sentence_",
    "short sentences": "short_",
    "groups": "category_",
    "printed word": "word_",
    "number of objects": "count_",
}
ROWS = {
    "chance": "chance",
    "majority": "majority",
    "pixels1": "pixel neighbour, k = 1",
    "pixels10": "pixel neighbour, k = 10",
}
METRICS = {
    "top1": "zero-shot top-1",
    "top5": "zero-shot top-5",
    "t2i_r1": "text to image R@1",
    "t2i_r5": "text to image R@5",
    "t2i_r10": "text to image R@10",
    "i2t_r1": "image to text R@1",
    "i2t_r5": "image to text R@5",
    "i2t_r10": "image to text R@10",
    "alt_t2i_r1": "alt to image R@1",
    "alt_t2i_r10": "alt to image R@10",
    "sentence_t2i_r1": "sentence to image R@1",
    "sentence_t2i_r10": "sentence to image R@10",
    "short_t2i_r1": "short sentence to image R@1",
    "short_t2i_r5": "short sentence to image R@5",
    "short_i2t_r1": "image to short sentence R@1",
    "category_top1": "group, zero-shot",
    "word_pooled_top1": "printed word, probe",
    "count_pooled_top1": "number of objects, probe",
}


@dataclass(frozen=True)
class Share:
    """A metric and its 95 % interval where it has one, 0 to 1."""

    value: float
    interval: tuple[float, float] | None = None

    def percent(self, digits: int = 1) -> str:
        """The share in %, with its interval to `digits`: "52.1 (47.2-57.0)", "0.25"."""
        value = 100 * self.value
        text = f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2f}"
        if self.interval is None:
            return text
        low, high = (f"{100 * bound:.{digits}f}" for bound in self.interval)
        return f"{text} ({low}-{high})"


@dataclass(frozen=True)
class HeldOut:
    """One held-out set: shares by row (baselines, then the model) and metric."""

    name: str
    images: int
    candidates: int
    rows: dict[str, dict[str, Share]]
    by_group: dict[str, float]
    """Zero-shot top-1 of the model by group of images."""
    prompts: str

    @property
    def title(self) -> str:
        """The set's name for people: "heldout_random" -> "held-out, random"."""
        return self.name.replace("heldout_", "held-out, ").replace("_", " ")

    def percent(self, row: str, metric: str, digits: int = 1) -> str:
        """A share in %; empty when it was not measured."""
        share = self.rows[row].get(metric)
        return share.percent(digits) if share is not None else ""


def held_out_sets(result: Result) -> list[HeldOut]:
    """The sets of a result of the suite `heldout`, in the order of the suite; sets without names are left out."""
    measured = result.measured
    titles = {entry["options"]["data"]: None for entry in measured.values()}
    return [_held_out(data, measured) for data in titles if title_on(data, "names") in measured]


def _held_out(data: str, measured: Mapping[str, Entry]) -> HeldOut:
    rows: dict[str, dict[str, Share]] = {row: {} for row in (*ROWS.values(), MODEL)}
    for name, prefix in PREFIXES.items():
        for metric, share in _shares(measured.get(title_on(data, name))):
            row, _, own = metric.partition("_")
            # A probe has its baselines beside it.
            if row in ROWS:
                rows[ROWS[row]][f"{prefix}pooled_{own}"] = share
            else:
                rows[MODEL][f"{prefix}{metric}"] = share
        for metric, share in _shares(measured.get(title_on(data, f"baselines, {name}"))):
            row, _, own = metric.partition("_")
            rows[ROWS[row]][f"{prefix}{own}"] = share
    names = measured[title_on(data, "names")]
    return HeldOut(
        data,
        int(names["facts"]["images"]),
        int(names["facts"]["classes"]),
        rows,
        names["details"].get("top1_by_group", {}),
        str(names["facts"]["prompts"]),
    )


def _shares(entry: Entry | None) -> Iterator[tuple[str, Share]]:
    if entry is None:
        return
    for metric, value in entry["values"].items():
        bounds = entry["intervals"].get(metric)
        yield metric, Share(value, (bounds[0], bounds[1]) if bounds is not None else None)


def measure_run(
    run: Path, data: str | Path | None, suite: Suite | None = None, settings: Settings | None = None
) -> Result:
    """Measure RUN/model by a suite, by default that of `suite_of_run`; writes evaluation.json and gallery into RUN."""
    chosen, folder = suite_of_run(run, data)
    (result,) = run_suite([str(run)], suite or chosen, folder, None, settings, say=lambda line: None)
    return result


def current_result(run: Path, data: str | Path | None, settings: Settings | None = None) -> Result:
    """The evaluation in RUN if it is about RUN/model as it is now, by its own suite; measured (again) otherwise."""
    checkpoint = file_sha256(run / "model" / "model.safetensors")
    if (run / "evaluation.json").is_file():
        result, (suite, _) = read_result(run), suite_of_run(run, data)
        if result.sha256 == checkpoint and result.content["complete"] and result.content["suite"]["name"] == suite.name:
            return result
    return measure_run(run, data, settings=settings)

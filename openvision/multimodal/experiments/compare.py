"""The paper's experiment as one command: the same model around each encoder, trained and scored alike.

    out/NAME/built/            tower, projector and language model
    out/NAME/run/              the training run; out/NAME/run/model is the trained model
    out/NAME/scores/BENCHMARK/ answers and numbers
    out/comparison.json        everything in the table, with where it came from
    out/comparison.md          the table

Beside real encoders there are two that nothing should lose to: `random:ENCODER` has an encoder's shape and weights that
were never trained, and `blind` is the language model trained on the same conversations without their pictures. The
same command goes on with a comparison that was cut off.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text, make_folder
from openvision.multimodal.benchmarks import Benchmark, find_benchmark
from openvision.multimodal.benchmarks.answerer import load_answerer
from openvision.multimodal.benchmarks.runner import Options, fingerprint, run_benchmark
from openvision.multimodal.experiments.baselines import BLIND, blind_data, blind_recipe, random_encoder
from openvision.multimodal.model.build import BuildOptions, build
from openvision.multimodal.recipe import VlmRecipe, dump_vlm_recipe
from openvision.multimodal.training.run import train
from openvision.provenance import git_state, library_versions, processor_name
from openvision.runtime import resolve_precision
from openvision.weights.load import Request

RESULT, TABLE = "comparison.json", "comparison.md"
_RANDOM = "random:"
_PLAN, _SECONDS = "plan.json", "seconds.json"


@dataclass(frozen=True)
class Contestant:
    """An encoder and the name its rows have."""

    name: str
    source: str
    """Checkpoint, folder of a stock tower, `random:` and either, or `blind`."""


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how."""

    contestants: tuple[Contestant, ...]
    llm: str
    recipe: VlmRecipe
    data: Path
    """Folder that holds the files named in the recipe."""
    benchmarks: tuple[tuple[str, Benchmark, Path], ...]
    """Name of the column, benchmark and folder with its files."""
    limit: int | None = None
    """Samples seen in a stage, at most."""
    question_limit: int | None = None
    batch_size: int = 16
    build: BuildOptions = field(default_factory=BuildOptions)
    request: Request | None = None


def parse_contestants(texts: Sequence[str]) -> tuple[Contestant, ...]:
    """`NAME=ENCODER` or `ENCODER`; raises OpenVisionError for a name given twice."""
    contestants = []
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals:
            name, source = _short_name(text), text
        contestants.append(Contestant(name, source))
    names = [contestant.name for contestant in contestants]
    for name in names:
        if names.count(name) > 1:
            raise OpenVisionError(
                f"two encoders are called {name!r}; name them, e.g. --encoder mine={contestants[0].source}"
            )
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise OpenVisionError(
                f"{name!r} cannot name a folder; write NAME=ENCODER with a name of letters and digits"
            )
    if not contestants:
        raise OpenVisionError("there is no encoder to compare; give --encoder at least once")
    return tuple(contestants)


def _short_name(source: str) -> str:
    """runs/quickstart/model -> quickstart, random:runs/quickstart/model -> random-quickstart."""
    if source.startswith(_RANDOM):
        return f"random-{_short_name(source.removeprefix(_RANDOM))}"
    parts = [part for part in Path(source).parts if part not in ("model", "/", "..", ".")]
    return parts[-1] if parts else source


def parse_benchmarks(texts: Sequence[str]) -> tuple[tuple[str, Benchmark, Path], ...]:
    """`NAME=FOLDER` or `COLUMN:NAME=FOLDER`, where NAME is a benchmark's."""
    found = []
    for text in texts:
        head, equals, folder = text.partition("=")
        column, _, name = head.rpartition(":")
        if not equals:
            raise OpenVisionError(f"--benchmark {text!r} names no folder; write e.g. textvqa=data/textvqa")
        found.append((column or name, find_benchmark(name), Path(folder)))
    columns = [column for column, _, _ in found]
    if len(set(columns)) < len(columns):
        raise OpenVisionError("a benchmark is given twice; tell them apart, e.g. --benchmark val:textvqa=data/textvqa")
    return tuple(found)


def compare(plan: Comparison, out: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Build, train and score a model around each encoder; returns what is in `out`/comparison.json."""
    for column, benchmark, folder in plan.benchmarks:
        # Before hours of training: a wrong folder is told at once.
        say(f"{column}: {len(benchmark.read(folder))} questions")
    _claim(plan, make_folder(out))
    rows = []
    for contestant in plan.contestants:
        say(f"{contestant.name}: building and training")
        place = out / contestant.name
        with _timed(place, "training"):
            model = _trained(plan, contestant, place, say)
        say(f"{contestant.name}: answering")
        with _timed(place, "answering"):
            scores = {
                column: _score(plan, contestant, model, benchmark, folder, place / "scores" / column, say)
                for column, benchmark, folder in plan.benchmarks
            }
        row = {"name": contestant.name, "encoder": contestant.source, "seconds": _seconds(place)}
        rows.append({**row, "scores": scores})
    result = {
        "llm": plan.llm,
        "recipe": plan.recipe.name,
        "samples": [stage.samples for stage in _limited(plan.recipe, plan.limit).stages],
        "rows": rows,
        "git": git_state(),
        "libraries": library_versions(),
        "processor": processor_name(),
    }
    atomic_write_text(out / RESULT, json.dumps(result, indent=2) + "\n")
    atomic_write_text(out / TABLE, tables(result))
    return result


def tables(result: dict[str, Any]) -> str:
    """The table of headline metrics, and below it every metric of every benchmark, a column an encoder."""
    rows = result["rows"]
    parts = [table(result)]
    for column, score in rows[0]["scores"].items():
        lines = [f"| {column} | " + " | ".join(row["name"] for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
        for metric in score["metrics"]:
            cells = [_plain(row["scores"][column]["metrics"].get(metric)) for row in rows]
            lines.append(f"| {metric} | " + " | ".join(cells) + " |")
        parts.append(
            f"{score['questions']} questions about {score['pictures']} pictures:\n\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def table(result: dict[str, Any]) -> str:
    """A markdown table: a row an encoder, headline metrics with their 95 % intervals, minutes of training."""
    first = result["rows"][0]["scores"]
    columns = [(column, metric) for column, score in first.items() for metric in score["headline"]]
    names = [f"{column} {metric.replace('_', '/')}" for column, metric in columns]
    lines = ["| encoder | " + " | ".join([*names, "minutes"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in result["rows"]:
        cells = [_cell(row["scores"][column]["metrics"].get(metric)) for column, metric in columns]
        minutes = f"{sum(row['seconds'].values()) / 60:.1f}"
        lines.append(f"| {row['name']} | " + " | ".join([*cells, minutes]) + " |")
    return "\n".join(lines) + "\n"


def _cell(number: dict[str, float] | None) -> str:
    return f"{number['value']:.1f} ({number['low']:.1f}, {number['high']:.1f})" if number else "-"


def _plain(number: dict[str, float] | None) -> str:
    return f"{number['value']:.1f}" if number else "-"


@contextmanager
def _timed(folder: Path, what: str) -> Iterator[None]:
    """Add the seconds of the block to `folder`/seconds.json; what a kill cuts off is not counted."""
    start = time.monotonic()
    yield
    seconds = _seconds(folder)
    seconds[what] = seconds.get(what, 0.0) + time.monotonic() - start
    atomic_write_text(folder / _SECONDS, json.dumps(seconds) + "\n")


def _seconds(folder: Path) -> dict[str, float]:
    path = folder / _SECONDS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _claim(plan: Comparison, out: Path) -> None:
    """Refuse a folder that holds another comparison; more encoders and benchmarks may join later."""
    content = {"llm": plan.llm, "recipe": dump_vlm_recipe(plan.recipe), "limit": plan.limit, "data": str(plan.data)}
    path = out / _PLAN
    if not path.exists():
        atomic_write_text(path, json.dumps(content, indent=2) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(key for key in content if before.get(key) != content[key])
    if changed:
        raise OpenVisionError(f"{out} holds a comparison with another {', '.join(changed)}; choose another folder")


def _trained(plan: Comparison, contestant: Contestant, folder: Path, say: Callable[[str], None]) -> Path:
    """The trained model around one encoder, made or found."""
    built, run = folder / "built", folder / "run"
    recipe, data = _limited(plan.recipe, plan.limit), plan.data
    blind = contestant.source == BLIND
    if not (built / "config.json").is_file():
        build(_encoder(plan, contestant, folder), plan.llm, built, plan.build, plan.request)
    if blind:
        recipe, data = blind_recipe(recipe), blind_data(recipe, plan.data, folder / "data")
    return train(recipe, built, data, run, lambda line: say(f"{contestant.name}  {line}"))


def _encoder(plan: Comparison, contestant: Contestant, folder: Path) -> str | Path:
    """What `build` takes for a contestant; a blind model has the first real encoder, which sees nothing."""
    source = contestant.source
    if source == BLIND:
        real = [other.source for other in plan.contestants if other.source != BLIND]
        if not real:
            raise OpenVisionError("blind needs an encoder beside it; give --encoder at least once more")
        source = real[0].removeprefix(_RANDOM)
    if source.startswith(_RANDOM):
        return random_encoder(source.removeprefix(_RANDOM), folder / "encoder", plan.build.seed, plan.request)
    return source


def _limited(recipe: VlmRecipe, limit: int | None) -> VlmRecipe:
    """The recipe with at most `limit` samples a stage."""
    if limit is None:
        return recipe
    stages = tuple(stage.model_copy(update={"samples": min(stage.samples or limit, limit)}) for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})


def _score(
    plan: Comparison,
    contestant: Contestant,
    model: Path,
    benchmark: Benchmark,
    data: Path,
    out: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    blind = contestant.source == BLIND
    told = 0.0

    def progress(done: int, share: float) -> None:
        nonlocal told
        if share - told >= 0.25 or share >= 1:
            told = share
            say(f"{contestant.name}  {benchmark.title}: {done} answers  {share:.0%}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(resolve_precision(plan.recipe.run.precision, device)).removeprefix("torch.")
    identity = {"model": contestant.name, "model_sha256": fingerprint(model), "dtype": dtype, "blind": blind}
    options = Options(plan.question_limit, plan.batch_size, progress)
    result = run_benchmark(
        benchmark, data, lambda: load_answerer(model, dtype=dtype, blind=blind), identity, out, options
    )
    return {key: result[key] for key in ("benchmark", "questions", "pictures", "headline", "metrics")}

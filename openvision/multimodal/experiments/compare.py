"""Compare encoders: train and score the same model around each one, as the paper does.

    out/NAME/built/            tower, projector and language model
    out/NAME/run/              the training run; out/NAME/run/model is the trained model
    out/NAME/scores/BENCHMARK/ answers and metrics
    out/comparison.json        all results with their provenance
    out/comparison.md          the table

There are two baselines that every encoder should beat: `random:ENCODER` has an encoder's shape and random weights, and
`blind` is the language model trained on the same conversations without images. The same command resumes an interrupted
comparison.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_text, make_folder
from openvision.models.vision import VisionTransformer
from openvision.multimodal.benchmarks import Benchmark, find_benchmark
from openvision.multimodal.benchmarks.benchmark import Estimate
from openvision.multimodal.benchmarks.runner import (
    Identity,
    Options,
    Score,
    fingerprint,
    load_answerer,
    run_benchmark,
)
from openvision.multimodal.model.build import BuildOptions, build
from openvision.multimodal.model.llm import IMAGE_TOKEN
from openvision.multimodal.recipe import VlmRecipe, VlmStage, dump_vlm_recipe, is_vlm_recipe
from openvision.multimodal.training.run import train
from openvision.provenance import git_state, library_versions, processor_name
from openvision.runtime import resolve_device, resolve_precision
from openvision.weights.folder import save_folder
from openvision.weights.load import Request, load_checkpoint

RESULT, TABLE = "comparison.json", "comparison.md"
BLIND = "blind"
_RANDOM = "random:"
_PLAN, _SECONDS = "plan.json", "seconds.json"


@dataclass(frozen=True)
class Contestant:
    """An encoder and its name in the table."""

    name: str
    source: str
    """A checkpoint, a folder of a stock tower, `random:CHECKPOINT` or `blind`."""


@dataclass(frozen=True)
class EncoderComparison:
    """Encoders, the model around them, and the benchmarks."""

    contestants: tuple[Contestant, ...]
    llm: str
    recipe: VlmRecipe
    data: Path
    """Folder that holds the files named in the recipe."""
    benchmarks: tuple[tuple[str, Benchmark, Path], ...]
    """Column name, benchmark and folder of its files."""
    limit: int | None = None
    """Maximum number of samples in a stage."""
    question_limit: int | None = None
    batch_size: int = 16
    build: BuildOptions = field(default_factory=BuildOptions)
    request: Request | None = None
    device: str = "auto"
    """As for `runtime.resolve_device`; no part of what is compared."""


class EncoderRow(TypedDict):
    """Results of one encoder."""

    name: str
    encoder: str
    seconds: dict[str, float]
    """Training and answering."""
    scores: dict[str, Score]
    """By column."""


class ComparisonResult(TypedDict):
    """Content of comparison.json."""

    llm: str
    recipe: str
    samples: list[int | None]
    rows: list[EncoderRow]
    git: JsonObject | None
    libraries: dict[str, str]
    processor: str


def parse_contestants(texts: Sequence[str]) -> tuple[Contestant, ...]:
    """Parse `NAME=ENCODER` or `ENCODER`; raises OpenVisionError for a repeated or unusable name."""
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
                f"two encoders have the name {name!r}; name them, e.g. --encoder mine={contestants[0].source}"
            )
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise OpenVisionError(
                f"{name!r} cannot be the name of a folder; write NAME=ENCODER with a name of letters and digits"
            )
    if not contestants:
        raise OpenVisionError("no encoder to compare; give --encoder at least once")
    return tuple(contestants)


def _short_name(source: str) -> str:
    """runs/quickstart/model -> quickstart, random:runs/quickstart/model -> random-quickstart."""
    if source.startswith(_RANDOM):
        return f"random-{_short_name(source.removeprefix(_RANDOM))}"
    parts = [part for part in Path(source).parts if part not in ("model", "/", "..", ".")]
    return parts[-1] if parts else source


def parse_benchmarks(texts: Sequence[str]) -> tuple[tuple[str, Benchmark, Path], ...]:
    """Parse `BENCHMARK=FOLDER` or `COLUMN:BENCHMARK=FOLDER`; raises OpenVisionError for repeated columns."""
    found = []
    for text in texts:
        head, equals, folder = text.partition("=")
        column, _, name = head.rpartition(":")
        if not equals:
            raise OpenVisionError(f"--benchmark {text!r} has no folder; write e.g. textvqa=data/textvqa")
        found.append((column or name, find_benchmark(name), Path(folder)))
    columns = [column for column, _, _ in found]
    if len(set(columns)) < len(columns):
        raise OpenVisionError("a benchmark is given twice; name the columns, e.g. --benchmark val:textvqa=data/textvqa")
    return tuple(found)


def compare(plan: EncoderComparison, out: Path, say: Callable[[str], None] = lambda _: None) -> ComparisonResult:
    """Build, train and score a model around each encoder; write and return `out`/comparison.json."""
    # A device that is not there is an error before anything is read.
    resolve_device(plan.device)
    for column, benchmark, folder in plan.benchmarks:
        # Fails for a wrong folder before hours of training.
        say(f"{column}: {len(benchmark.read(folder))} questions")
    _claim(plan, make_folder(out))
    rows: list[EncoderRow] = []
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
        name, source = contestant.name, contestant.source
        rows.append({"name": name, "encoder": source, "seconds": _seconds(place), "scores": scores})
    result: ComparisonResult = {
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


def tables(result: ComparisonResult) -> str:
    """Markdown tables: headline metrics, then all metrics of each benchmark with one column for each encoder."""
    rows = result["rows"]
    parts = [table(result)]
    for column, score in rows[0]["scores"].items():
        lines = [f"| {column} | " + " | ".join(row["name"] for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
        for metric in score["metrics"]:
            cells = [_plain(row["scores"][column]["metrics"].get(metric)) for row in rows]
            lines.append(f"| {metric} | " + " | ".join(cells) + " |")
        parts.append(f"{score['questions']} questions about {score['images']} images:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def table(result: ComparisonResult) -> str:
    """Markdown table of headline metrics with 95 % intervals and minutes, one row for each encoder."""
    first = result["rows"][0]["scores"]
    columns = [(column, metric) for column, score in first.items() for metric in score["headline"]]
    names = [f"{column} {metric.replace('_', '/')}" for column, metric in columns]
    lines = ["| encoder | " + " | ".join([*names, "minutes"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in result["rows"]:
        cells = [_cell(row["scores"][column]["metrics"].get(metric)) for column, metric in columns]
        minutes = f"{sum(row['seconds'].values()) / 60:.1f}"
        lines.append(f"| {row['name']} | " + " | ".join([*cells, minutes]) + " |")
    return "\n".join(lines) + "\n"


def _cell(number: Estimate | None) -> str:
    return f"{number['value']:.1f} ({number['low']:.1f}, {number['high']:.1f})" if number else "-"


def _plain(number: Estimate | None) -> str:
    return f"{number['value']:.1f}" if number else "-"


@contextmanager
def _timed(folder: Path, what: str) -> Iterator[None]:
    """Add the seconds of the block to `folder`/seconds.json, unless it is killed."""
    start = time.monotonic()
    yield
    seconds = _seconds(folder)
    seconds[what] = seconds.get(what, 0.0) + time.monotonic() - start
    atomic_write_text(folder / _SECONDS, json.dumps(seconds) + "\n")


def _seconds(folder: Path) -> dict[str, float]:
    path = folder / _SECONDS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _claim(plan: EncoderComparison, out: Path) -> None:
    """Raise OpenVisionError when the folder holds another comparison; encoders and benchmarks may be added."""
    content = {"llm": plan.llm, "recipe": dump_vlm_recipe(plan.recipe), "limit": plan.limit, "data": str(plan.data)}
    path = out / _PLAN
    if not path.exists():
        atomic_write_text(path, json.dumps(content, indent=2) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if is_vlm_recipe(before.get("recipe", ""), plan.recipe):
        before["recipe"] = content["recipe"]
    changed = sorted(key for key in content if before.get(key) != content[key])
    if changed:
        raise OpenVisionError(f"{out} holds a comparison with another {', '.join(changed)}; choose another folder")


def _trained(plan: EncoderComparison, contestant: Contestant, folder: Path, say: Callable[[str], None]) -> Path:
    """Train the model around one encoder, unless it is complete; return its folder."""
    built, run = folder / "built", folder / "run"
    recipe, data = _limited(plan.recipe, plan.limit), plan.data
    blind = contestant.source == BLIND
    if not (built / "config.json").is_file():
        build(_encoder(plan, contestant, folder), plan.llm, built, plan.build, plan.request)
    if blind:
        recipe = blind_recipe(recipe)
        data = blind_data(recipe.stages, plan.data, folder / "data")
    return train(recipe, built, data, run, lambda line: say(f"{contestant.name}  {line}"), plan.device)


def _encoder(plan: EncoderComparison, contestant: Contestant, folder: Path) -> str | Path:
    """The encoder that `build` takes; a blind model is built around the first real encoder, which gets no image."""
    source = contestant.source
    if source == BLIND:
        real = [other.source for other in plan.contestants if other.source != BLIND]
        if not real:
            raise OpenVisionError("blind needs another encoder beside it; give --encoder again")
        source = real[0].removeprefix(_RANDOM)
    if source.startswith(_RANDOM):
        return random_encoder(source.removeprefix(_RANDOM), folder / "encoder", plan.build.seed, plan.request)
    return source


def random_encoder(source: str, folder: Path, seed: int, request: Request | None = None) -> Path:
    """Write a vision tower with the shape of the OpenVision checkpoint `source` and freshly initialised weights."""
    shape = load_checkpoint(source, request or Request(vision_only=True)).vision.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = VisionTransformer(shape, None)
        tower.init_weights()
    save_folder(folder, tower, None, "", {"random_weights_of_the_shape_of": source, "seed": seed})
    return folder


def blind_recipe(recipe: VlmRecipe) -> VlmRecipe:
    """The stages that train the language model, with projector and encoder frozen.

    Raises OpenVisionError when there is none, or when one reads a data set from the Hub.
    """
    stages = []
    for stage in recipe.stages:
        if stage.hub is not None:
            raise OpenVisionError(f"stage {stage.name} reads a data set from the Hub; use conversation files for blind")
        if stage.learning_rate.llm is not None:
            rates = stage.learning_rate.model_copy(update={"projector": None, "encoder": None})
            stages.append(stage.model_copy(update={"learning_rate": rates}))
    if not stages:
        raise OpenVisionError("no stage trains the language model, so blind would learn nothing; remove blind")
    return recipe.model_copy(update={"stages": tuple(stages)})


def blind_data(stages: Sequence[VlmStage], data: Path, folder: Path) -> Path:
    """Write the recipe's conversations without images into `folder`."""
    for name in {name for stage in stages for name in stage.files}:
        text = (data / name).read_text(encoding="utf-8")
        lines = name.endswith(".jsonl")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
        stripped = [_without_images(row) for row in rows]
        content = "".join(json.dumps(row) + "\n" for row in stripped) if lines else json.dumps(stripped)
        atomic_write_text(folder / name, content)
    return folder


def _without_images(row: JsonObject) -> JsonObject:
    row = {key: value for key, value in row.items() if key not in ("image", "images")}
    for name, text in (("conversations", "value"), ("messages", "content")):
        if name in row:
            row[name] = [turn | {text: turn[text].replace(IMAGE_TOKEN, "").strip()} for turn in row[name]]
    return row


def _limited(recipe: VlmRecipe, limit: int | None) -> VlmRecipe:
    """The recipe with at most `limit` samples a stage."""
    if limit is None:
        return recipe
    stages = tuple(stage.model_copy(update={"samples": min(stage.samples or limit, limit)}) for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})


def _score(
    plan: EncoderComparison,
    contestant: Contestant,
    model: Path,
    benchmark: Benchmark,
    data: Path,
    out: Path,
    say: Callable[[str], None],
) -> Score:
    blind = contestant.source == BLIND
    reported = 0.0

    def progress(done: int, share: float) -> None:
        nonlocal reported
        if share - reported >= 0.25 or share >= 1:
            reported = share
            say(f"{contestant.name}  {benchmark.title}: {done} answers  {share:.0%}")

    device = resolve_device(plan.device)
    dtype = str(resolve_precision(plan.recipe.run.precision, device)).removeprefix("torch.")
    identity: Identity = {"model": contestant.name, "model_sha256": fingerprint(model), "dtype": dtype, "blind": blind}
    options = Options(plan.question_limit, plan.batch_size, progress)
    result = run_benchmark(benchmark, data, lambda: load_answerer(model, device, dtype, blind), identity, out, options)
    return {
        "benchmark": result["benchmark"],
        "questions": result["questions"],
        "images": result["images"],
        "headline": result["headline"],
        "metrics": result["metrics"],
    }

"""Run a benchmark: ask a model all questions, write its answers, compute metrics. An interrupted run resumes.

The output folder holds `run.json` (model and questions), `answers.jsonl` (one line for each answer, appended batch by
batch) and, when it is complete, `result.json`. Another model or other questions in the same folder are an error.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict

import torch
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, append_lines, atomic_write_text, make_folder, read_json_lines
from openvision.images.decode import BadSampleError, to_rgb_image
from openvision.multimodal.benchmarks.benchmark import Benchmark, Estimate, Question, tabulate, with_intervals
from openvision.multimodal.model.generate import Decoding, Prompt, load_assistant
from openvision.provenance import git_state, library_versions

RUN, ANSWERS, RESULT, JUDGE = "run.json", "answers.jsonl", "result.json", "for_the_judge.json"
SCORES = "scores"
"""Folder in a model's folder for answers and metrics, where no other is named."""
_EDGE = 1 << 20


class Answerer(Protocol):
    """A model, or a test's stand-in, that answers questions about images."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """One greedy answer for each RGB image and prompt."""
        ...


@dataclass(frozen=True)
class Options:
    """How a benchmark is run."""

    limit: int | None = None
    """Approximate number of questions, sampled by image with a fixed seed."""
    batch_size: int = 8
    progress: Callable[[int, float], None] | None = None
    """Called with the number of answers and their share."""


class Score(TypedDict):
    """Metrics of a complete benchmark."""

    benchmark: str
    questions: int
    images: int
    headline: list[str]
    """Metrics that are shown first."""
    metrics: dict[str, Estimate]


class BenchmarkResult(Score):
    """Content of result.json."""

    model: "Identity"
    git: JsonObject | None
    libraries: dict[str, str]


class Identity(TypedDict):
    """Which model answered."""

    model: str
    model_sha256: NotRequired[str]
    dtype: NotRequired[str]
    blind: NotRequired[bool]


def load_answerer(
    model: str | Path, device: str | torch.device | None = None, dtype: str = "auto", blind: bool = False
) -> Answerer:
    """Load a LLaVA folder as an `Answerer`; a `blind` one gets the prompts without the images."""
    assistant = load_assistant(model, device, dtype)

    def answer(images: Sequence[Image.Image], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        asked = [Prompt(prompt, () if blind else (image,)) for image, prompt in zip(images, prompts, strict=True)]
        return assistant.answer(asked, Decoding(max_new_tokens=max_new_tokens, batch_size=len(asked)))

    return answer


def run_benchmark(
    benchmark: Benchmark,
    data: Path,
    answerer: Callable[[], Answerer],
    identity: Identity,
    out: Path,
    options: Options | None = None,
) -> BenchmarkResult:
    """Ask every question of `benchmark` in folder `data`; write and return `out`/result.json.

    `answerer` loads the model and is called only when answers are missing. Raises OpenVisionError for data in another
    layout and for an output folder of another run.
    """
    options = options or Options()
    if not data.is_dir():
        raise OpenVisionError(f"{data} is not a folder; {benchmark.title} needs {benchmark.layout}")
    questions = sample_questions(benchmark.read(data), options.limit)
    if not questions:
        raise OpenVisionError(f"{data} has no question of {benchmark.title}; it must hold {benchmark.layout}")
    asked = {**identity, "benchmark": benchmark.name, "questions_sha256": _hash_of(questions)}
    answers = _resume(make_folder(out), {**asked, "max_new_tokens": benchmark.max_new_tokens})
    missing = [question for question in questions if question.id not in answers]
    if missing:
        _ask(missing, answers, answerer(), benchmark.max_new_tokens, out, options)
    result: BenchmarkResult = {
        **score(benchmark, questions, answers),
        "model": identity,
        "git": git_state(),
        "libraries": library_versions(),
    }
    atomic_write_text(out / RESULT, json.dumps(result, indent=2) + "\n")
    if benchmark.export is not None:
        atomic_write_text(out / JUDGE, json.dumps(benchmark.export(questions, answers), indent=2) + "\n")
    return result


def score(benchmark: Benchmark, questions: list[Question], answers: dict[str, str]) -> Score:
    """Metrics with 95 % intervals from all answers, by question id."""
    marks = tabulate(benchmark, questions, answers)
    return {
        "benchmark": benchmark.name,
        "questions": len(questions),
        "images": int(marks.clusters.max()) + 1,
        "headline": list(benchmark.headline),
        "metrics": with_intervals(benchmark, marks),
    }


def sample_questions(questions: list[Question], limit: int | None) -> list[Question]:
    """About `limit` questions in their order: all those of images that are sampled with a fixed seed."""
    if limit is None or limit >= len(questions):
        return questions
    by_image: dict[str, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.cluster or str(question.image), []).append(question)
    images = sorted(by_image)
    random.Random(0).shuffle(images)
    chosen: set[str] = set()
    for name in images:
        if len(chosen) >= limit:
            break
        chosen.update(question.id for question in by_image[name])
    return [question for question in questions if question.id in chosen]


def fingerprint(model: str | Path, results: Path | None = None) -> str:
    """SHA-256 of a model folder: names and sizes of its files, and the first and last MiB of each.

    `results`, by default the folder `scores` in it, is where answers are written, and no part of the model.
    """
    root = Path(model)
    if not root.is_dir():
        return hashlib.sha256(str(model).encode()).hexdigest()
    digest = hashlib.sha256()
    outputs = [folder.resolve() for folder in (root / SCORES, results) if folder is not None]
    for path in sorted(root.rglob("*.*")):
        if any(path.resolve().is_relative_to(output) for output in outputs):
            continue
        if path.suffix in (".safetensors", ".json", ".jinja"):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(root)} {size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_EDGE))
                file.seek(max(0, size - _EDGE))
                digest.update(file.read(_EDGE))
    return digest.hexdigest()


def _hash_of(questions: Sequence[Question]) -> str:
    text = json.dumps([(question.id, question.prompt, question.image.name) for question in questions])
    return hashlib.sha256(text.encode()).hexdigest()


def _resume(out: Path, asked: Mapping[str, object]) -> dict[str, str]:
    """Answers that an earlier run left in `out`; raises OpenVisionError when it asked something else."""
    if (out / RUN).is_file():
        before = json.loads((out / RUN).read_text(encoding="utf-8"))
        changed = sorted(key for key in before.keys() | asked.keys() if before.get(key) != asked.get(key))
        if changed:
            raise OpenVisionError(
                f"{out} holds answers of another run ({', '.join(changed)} differ); choose another output folder"
            )
        if (out / ANSWERS).is_file():
            return {row["id"]: row["answer"] for row in _whole_lines(out / ANSWERS)}
        return {}
    atomic_write_text(out / RUN, json.dumps(asked, indent=2) + "\n")
    return {}


def _whole_lines(path: Path) -> list[JsonObject]:
    rows = read_json_lines(path)
    # Rewritten, because the next line would be appended to one that a crash cut short.
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _ask(
    questions: list[Question],
    answers: dict[str, str],
    answerer: Answerer,
    max_new_tokens: int,
    out: Path,
    options: Options,
) -> None:
    # Prompts of similar length share a batch, for little padding.
    ordered = sorted(questions, key=lambda question: (len(question.prompt), question.id))
    before = len(answers)
    for start in range(0, len(ordered), options.batch_size):
        batch = ordered[start : start + options.batch_size]
        images = [_open(question.image) for question in batch]
        given = answerer(images, [question.prompt for question in batch], max_new_tokens)
        lines = [
            {"id": question.id, "answer": answer, "prompt": question.prompt, "truth": list(question.truth)}
            for question, answer in zip(batch, given, strict=True)
        ]
        append_lines(out / ANSWERS, "".join(json.dumps(line) + "\n" for line in lines))
        answers |= {line["id"]: line["answer"] for line in lines}
        if options.progress is not None:
            options.progress(len(answers), len(answers) / (before + len(questions)))


def _open(path: Path) -> Image.Image:
    try:
        return to_rgb_image(path.read_bytes())
    except (OSError, BadSampleError) as error:
        raise OpenVisionError(f"image {path} cannot be read: {error}; download it again") from error

"""Questions to a model, answers to a file, numbers from answers. A run that was cut off goes on where it stopped.

An output folder holds `run.json` (what was asked of which model), `answers.jsonl` (one line an answer, appended a batch
at a time) and, when all answers are there, `result.json`. The same command with another model or other questions in
the same folder is refused.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from openvision.errors import OpenVisionError
from openvision.files import append_text, atomic_write_text, make_folder, read_json_lines
from openvision.multimodal.benchmarks.intervals import tabulate, with_intervals
from openvision.multimodal.benchmarks.question import Benchmark, Question
from openvision.provenance import git_state, library_versions

RUN, ANSWERS, RESULT, JUDGE = "run.json", "answers.jsonl", "result.json", "for_the_judge.json"
_EDGE = 1 << 20


class Answerer(Protocol):
    """Whatever answers questions about pictures: a model, or a test's stand-in."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers, one a prompt; `images` are RGB."""
        ...


@dataclass(frozen=True)
class Options:
    """How a benchmark is run."""

    limit: int | None = None
    """About so many questions, drawn by picture with a fixed seed."""
    batch_size: int = 8
    progress: Callable[[int, float], None] | None = None
    """Told how many answers there are, and their share."""


def run_benchmark(
    benchmark: Benchmark,
    data: Path,
    answerer: Callable[[], Answerer],
    identity: dict[str, Any],
    out: Path,
    options: Options | None = None,
) -> dict[str, Any]:
    """Ask every question of `benchmark` in the folder `data` and return what is in `out`/result.json.

    `answerer` loads the model and is called only when answers are missing; `identity` says which model it is. Raises
    OpenVisionError for data that do not fit the layout and for an output folder of another run.
    """
    options = options or Options()
    if not data.is_dir():
        raise OpenVisionError(f"{data} is not a folder; {benchmark.title} needs {benchmark.layout}")
    questions = take(benchmark.read(data), options.limit)
    if not questions:
        raise OpenVisionError(f"{data} holds no question of {benchmark.title}; it must hold {benchmark.layout}")
    asked = {**identity, "benchmark": benchmark.name, "questions_sha256": _hash_of(questions)}
    answers = _resume(make_folder(out), {**asked, "max_new_tokens": benchmark.max_new_tokens})
    missing = [question for question in questions if question.id not in answers]
    if missing:
        _ask(missing, answers, answerer(), benchmark.max_new_tokens, out, options)
    result = score(benchmark, questions, answers)
    result |= {"model": identity, "git": git_state(), "libraries": library_versions()}
    atomic_write_text(out / RESULT, json.dumps(result, indent=2) + "\n")
    if benchmark.export is not None:
        atomic_write_text(out / JUDGE, json.dumps(benchmark.export(questions, answers), indent=2) + "\n")
    return result


def score(benchmark: Benchmark, questions: list[Question], answers: dict[str, str]) -> dict[str, Any]:
    """Numbers with 95 % intervals from a full set of answers, by question id."""
    marks = tabulate(benchmark, questions, answers)
    return {
        "benchmark": benchmark.name,
        "questions": len(questions),
        "pictures": int(marks.clusters.max()) + 1,
        "headline": list(benchmark.headline),
        "metrics": with_intervals(benchmark, marks),
    }


def take(questions: list[Question], limit: int | None) -> list[Question]:
    """About `limit` questions: whole pictures, drawn with a fixed seed, in the benchmark's order."""
    if limit is None or limit >= len(questions):
        return questions
    by_picture: dict[str, list[Question]] = {}
    for question in questions:
        by_picture.setdefault(question.cluster or str(question.image), []).append(question)
    pictures = sorted(by_picture)
    random.Random(0).shuffle(pictures)
    chosen: set[str] = set()
    for name in pictures:
        if len(chosen) >= limit:
            break
        chosen.update(question.id for question in by_picture[name])
    return [question for question in questions if question.id in chosen]


def fingerprint(model: str | Path) -> str:
    """Hash of a model folder: names and sizes of its files, and the first and last MiB of each."""
    root = Path(model)
    if not root.is_dir():
        return hashlib.sha256(str(model).encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.*")):
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


def _resume(out: Path, asked: dict[str, Any]) -> dict[str, str]:
    """Answers an earlier run left in `out`, after checking that it was the same run."""
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


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    rows = read_json_lines(path)
    # A line cut short by a crash would spoil the next one that is appended.
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
    # Prompts of like length share a batch, so little is padded.
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
        append_text(out / ANSWERS, "".join(json.dumps(line) + "\n" for line in lines))
        answers |= {line["id"]: line["answer"] for line in lines}
        if options.progress is not None:
            options.progress(len(answers), len(answers) / (before + len(questions)))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise OpenVisionError(f"picture {path} cannot be read: {error}; fetch it again") from error

"""MME (Fu et al. 2023): two yes-or-no questions for each image; accuracy plus the share of images with both correct."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError
from openvision.multimodal.benchmarks.benchmark import SINGLE_WORD, Benchmark, Marks, Question, find_image
from openvision.multimodal.benchmarks.scorers.normalise import starts_yes_or_no

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
LAYOUT = (
    "one folder for each task (existence, count, ...), with images and texts side by side or in the folders "
    "images and questions_answers_YN"
)
_OFFICIAL_INSTRUCTION = " Please answer yes or no."


def read(data: Path) -> list[Question]:
    """The questions of all tasks; a missing task is an error, because sums over fewer tasks mean nothing."""
    root = data / "MME_Benchmark_release_version"
    root = root if root.is_dir() else data
    root = root / "MME_Benchmark" if (root / "MME_Benchmark").is_dir() else root
    missing = [task for task in (*PERCEPTION, *COGNITION) if not (root / task).is_dir()]
    if missing:
        raise OpenVisionError(f"{root} lacks the tasks {', '.join(missing)}; it must hold {LAYOUT}")
    return [question for task in (*PERCEPTION, *COGNITION) for question in _read_task(root / task)]


def _read_task(folder: Path) -> list[Question]:
    split = (folder / "images").is_dir()
    texts, images = (folder / "questions_answers_YN", folder / "images") if split else (folder, folder)
    questions = []
    for path in sorted(texts.glob("*.txt")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        pairs = [line.split("\t") for line in lines]
        if len(pairs) != 2 or any(len(pair) != 2 for pair in pairs):
            raise OpenVisionError(
                f"{path} does not hold two lines of a question, a tab and an answer; download MME again"
            )
        image, cluster = find_image(images, path.stem), f"{folder.name}/{path.stem}"
        for number, (text, truth) in enumerate(pairs):
            prompt = text.strip().replace(_OFFICIAL_INSTRUCTION, "") + SINGLE_WORD
            right = truth.strip().lower()
            questions.append(Question(f"{cluster}/{number}", image, prompt, (right,), folder.name, cluster))
    return questions


def mark(question: Question, answer: str) -> dict[str, float]:
    """1 for an answer that starts with the correct word."""
    return {"right": float(starts_yes_or_no(answer) == question.truth[0])}


def metrics(marks: Marks, weights: NDArray[np.float64]) -> dict[str, float]:
    """Points of every task (0 to 200) and their sums: perception (up to 2000) and cognition (up to 800)."""
    right, clusters = marks.columns["right"], marks.clusters
    both = np.bincount(clusters, right)[clusters] == np.bincount(clusters)[clusters]
    points = {}
    for task in np.unique(marks.groups):
        rows = marks.groups == task
        total = weights[rows].sum()
        # Both questions of an image have the same weight, so the mean over questions is the mean over images.
        points[str(task)] = float(100 * ((right + both) * weights)[rows].sum() / total) if total else float("nan")
    sums = {
        "perception": sum(points[task] for task in PERCEPTION if task in points),
        "cognition": sum(points[task] for task in COGNITION if task in points),
    }
    return {**sums, **{f"points/{task}": value for task, value in points.items()}}


_TOP = {"perception": 2000.0, "cognition": 800.0} | {f"points/{task}": 200.0 for task in (*PERCEPTION, *COGNITION)}
MME = Benchmark("mme", "MME", LAYOUT, read, mark, metrics, 16, ("perception", "cognition"), _TOP)

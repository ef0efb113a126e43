"""OCRBench (Liu et al. 2023): 1,000 questions about text in images; the answer must contain the truth."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openvision.multimodal.benchmarks.benchmark import (
    Benchmark,
    Marks,
    Question,
    find_image,
    first_folder,
    read_json_list,
)

LAYOUT = "OCRBench.json (or OCRBench/OCRBench.json) and the folder OCRBench_Images"
_FORMULAS = "Handwritten Mathematical Expression Recognition"
RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
TASKS = {
    "text recognition": RECOGNITION,
    "scene text VQA": ("Scene Text-centric VQA",),
    "document VQA": ("Doc-oriented VQA",),
    "key information": ("Key Information Extraction",),
    "formulas": (_FORMULAS,),
}


def read(data: Path) -> list[Question]:
    """All 1,000 questions, each group one of the ten types."""
    nested = data / "OCRBench" / "OCRBench.json"
    rows = read_json_list(nested if nested.is_file() else data / "OCRBench.json", LAYOUT)
    images = first_folder(data, ("OCRBench_Images",), LAYOUT)
    return [
        Question(
            id=str(number),
            image=find_image(images, row["image_path"]),
            prompt=row["question"].strip(),
            truth=tuple(row["answers"]) if isinstance(row["answers"], list) else (row["answers"],),
            group=row["type"],
        )
        for number, row in enumerate(rows)
    ]


def contains(answer: str, truths: tuple[str, ...], formula: bool) -> bool:
    """Whether the answer contains a truth: case ignored, for formulas spaces ignored instead."""
    return any(_plain(truth, formula) in _plain(answer, formula) for truth in truths)


def _plain(text: str, formula: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if formula else text.lower()


def mark(question: Question, answer: str) -> dict[str, float]:
    """1 for an answer that contains a truth."""
    return {"right": float(contains(answer, question.truth, question.group == _FORMULAS))}


def metrics(marks: Marks, weights: NDArray[np.float64]) -> dict[str, float]:
    """Counts, as the benchmark reports them: the sum of all and of the five tasks."""
    points = marks.columns["right"] * weights
    tasks = {f"score/{task}": float(points[np.isin(marks.groups, types)].sum()) for task, types in TASKS.items()}
    return {"score": float(points.sum()), **tasks}


_TOP = {"score": 1000.0} | dict(
    zip((f"score/{task}" for task in TASKS), (300.0, 200.0, 200.0, 200.0, 100.0), strict=True)
)
OCRBENCH = Benchmark("ocrbench", "OCRBench", LAYOUT, read, mark, metrics, 128, ("score",), _TOP)

"""MM-Vet (Yu et al. 2023): open questions, graded by a language model; we write its input and read its grades.

The official evaluator takes one JSON file {"v1_0": answer, ...} and writes a file of grades; that file, read by
`judged`, gives the reported numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError
from openvision.multimodal.benchmarks.benchmark import (
    Benchmark,
    Marks,
    Question,
    find_image,
    first_folder,
    mean,
    read_json,
)

LAYOUT = "mm-vet.json and the folder images"
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def read(data: Path) -> list[Question]:
    """All questions; the group lists the capabilities that a question needs."""
    root = data / "mm-vet" if (data / "mm-vet").is_dir() else data
    images = first_folder(root, ("images",), LAYOUT)
    return [
        Question(
            id=number,
            image=find_image(images, row["imagename"]),
            prompt=row["question"],
            truth=(row["answer"],),
            group=" ".join(sorted(row["capability"])),
        )
        for number, row in read_json(root / "mm-vet.json", LAYOUT).items()
    ]


def mark(question: Question, answer: str) -> dict[str, float]:
    """1 for any answer; whether it is correct is for the judge to say."""
    return {"answered": float(bool(answer.strip()))}


def metrics(marks: Marks, weights: NDArray[np.float64]) -> dict[str, float]:
    """Share of questions with an answer, in percent. This is not a score."""
    return {"answered": mean(marks.columns["answered"], weights)}


def export(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, str]:
    """The input of the official evaluator."""
    return {question.id: answers[question.id] for question in questions}


def judged(questions: Sequence[Question], grades: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Score in total and by capability, in percent, from the evaluator's file of grades (mean over its runs)."""
    missing = [question.id for question in questions if not grades.get(question.id, {}).get("score")]
    if missing:
        raise OpenVisionError(
            f"the judge has not graded {missing[0]} and {len(missing) - 1} more; run the evaluator to the end"
        )
    scores = np.array([np.mean(grades[question.id]["score"]) for question in questions])
    totals = {"total": float(100 * scores.mean())}
    for capability in CAPABILITIES:
        needs = np.array([capability in question.group.split() for question in questions])
        if needs.any():
            totals[capability] = float(100 * scores[needs].mean())
    return totals


MMVET = Benchmark("mmvet", "MM-Vet", LAYOUT, read, mark, metrics, 1024, ("answered",), export=export)

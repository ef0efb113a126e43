"""Our own questions about drawn images, as `experiments/demo_data.py` writes them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError
from openvision.multimodal.benchmarks.benchmark import Benchmark, Marks, Question, group_means, mean, read_json_list
from openvision.multimodal.benchmarks.scorers.normalise import exact_answer, starts_yes_or_no
from openvision.untrusted import path_inside

# The images are beside the folders of the splits.
LAYOUT = "questions.json, a list of {id, image, kind, question, answer}; images relative to the folder"
_POLAR = "yes/no"


def read(data: Path) -> list[Question]:
    """The questions of one split."""
    questions = []
    for row in read_json_list(data / "questions.json", LAYOUT):
        image = path_inside(data.resolve().parent, f"{data.resolve().name}/{row['image']}")
        if not image.is_file():
            raise OpenVisionError(f"image {image} is missing; make the questions and images again")
        questions.append(Question(row["id"], image, row["question"], (row["answer"],), row["kind"]))
    return questions


def mark(question: Question, answer: str) -> dict[str, float]:
    """1 for the correct answer, case and punctuation ignored."""
    truth = question.truth[0]
    if question.group == _POLAR:
        said = starts_yes_or_no(answer)
        return {"right": float(said == truth), "yes": float(said == "yes")}
    return {"right": float(exact_answer(answer) == exact_answer(truth)), "yes": 0.0}


def metrics(marks: Marks, weights: NDArray[np.float64]) -> dict[str, float]:
    """Accuracy of open and yes-or-no questions, of every kind of open question, and the share of yes, in percent."""
    polar = (marks.groups == _POLAR).astype(np.float64)
    kinds = {f"open/{kind}": value for kind, value in group_means(marks, "right", weights).items() if kind != _POLAR}
    return {
        "open": mean(marks.columns["right"], weights * (1 - polar)),
        "yes_no": mean(marks.columns["right"], weights * polar),
        "yes_ratio": mean(marks.columns["yes"], weights * polar),
        **kinds,
    }


PICTURES = Benchmark("pictures", "Drawn images", LAYOUT, read, mark, metrics, 12, ("open", "yes_no"))

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
_KEYS = ("id", "image", "kind", "question", "answer")


def read(data: Path) -> list[Question]:
    """The questions of one split; raises OpenVisionError that names a question of another form."""
    questions = []
    for number, row in enumerate(read_json_list(data / "questions.json", LAYOUT)):
        _check(row, f"{data / 'questions.json'}: question {number + 1}")
        image = path_inside(data.resolve().parent, f"{data.resolve().name}/{row['image']}")
        if not image.is_file():
            raise OpenVisionError(f"image {image} is missing; make the questions and images again")
        questions.append(Question(row["id"], image, row["question"], (row["answer"],), _kind(row["kind"])))
    return questions


def _check(row: object, place: str) -> None:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key].strip() for key in _KEYS):
        raise OpenVisionError(f"{place} needs {', '.join(_KEYS)}, each a text that is not empty")
    kind, yes_or_no = _kind(row["kind"]), exact_answer(row["answer"]) in ("yes", "no")
    if kind == _POLAR and not yes_or_no:
        raise OpenVisionError(f"{place} is of kind {_POLAR!r}, and its answer {row['answer']!r} is neither yes nor no")
    if kind != _POLAR and yes_or_no:
        raise OpenVisionError(f"{place} is answered by yes or no, and its kind is {row['kind']!r}; write {_POLAR!r}")


def _kind(kind: str) -> str:
    """Kinds are compared without case and outer spaces."""
    return kind.strip().lower()


def mark(question: Question, answer: str) -> dict[str, float]:
    """1 for the correct answer, case and punctuation ignored."""
    truth = exact_answer(question.truth[0])
    if question.group == _POLAR:
        said = starts_yes_or_no(answer)
        return {"right": float(said == truth), "yes": float(said == "yes")}
    return {"right": float(exact_answer(answer) == truth), "yes": 0.0}


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

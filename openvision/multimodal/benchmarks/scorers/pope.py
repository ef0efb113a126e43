"""POPE (Li et al. 2023): "is there a ...?" Half of the objects are absent, sampled in three ways."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openvision.multimodal.benchmarks.benchmark import (
    SINGLE_WORD,
    Benchmark,
    Marks,
    Question,
    find_image,
    first_folder,
    mean,
    read_lines,
)
from openvision.multimodal.benchmarks.scorers.normalise import says_no

LAYOUT = "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json and the folder val2014 of COCO"
WAYS = ("random", "popular", "adversarial")


def read(data: Path) -> list[Question]:
    """The questions of all three ways of sampling absent objects."""
    coco = data / "coco" if (data / "coco").is_dir() else data
    images = first_folder(data, ("val2014", "images"), LAYOUT)
    return [
        Question(
            id=f"{way}-{row['question_id']}",
            image=find_image(images, row["image"]),
            prompt=row["text"].strip() + SINGLE_WORD,
            truth=(row["label"],),
            group=way,
        )
        for way in WAYS
        for row in read_lines(coco / f"coco_pope_{way}.json", LAYOUT)
    ]


def mark(question: Question, answer: str) -> dict[str, float]:
    """Answer and truth, 1 for yes."""
    return {"said": float(not says_no(answer)), "true": float(question.truth[0] == "yes")}


def metrics(marks: Marks, weights: NDArray[np.float64]) -> dict[str, float]:
    """Accuracy, F1, precision, recall and share of yes, in percent: means over the three ways, and each way."""
    per_way = {str(way): _of_one_way(marks, weights * (marks.groups == way)) for way in np.unique(marks.groups)}
    names = ("accuracy", "f1", "precision", "recall", "yes_ratio")
    averages = {name: float(np.mean([numbers[name] for numbers in per_way.values()])) for name in names}
    return averages | {f"{name}/{way}": numbers[name] for way, numbers in per_way.items() for name in names}


def _of_one_way(marks: Marks, weights: NDArray[np.float64]) -> dict[str, float]:
    said, true = marks.columns["said"], marks.columns["true"]
    hits = (said * true * weights).sum()
    # A model that never says yes has no precision; 0 keeps F1 defined.
    precision = hits / max((said * weights).sum(), 1e-12)
    recall = hits / max((true * weights).sum(), 1e-12)
    return {
        "accuracy": mean((said == true).astype(np.float64), weights),
        "f1": float(200 * precision * recall / max(precision + recall, 1e-12)),
        "precision": float(100 * precision),
        "recall": float(100 * recall),
        "yes_ratio": mean(said, weights),
    }


POPE = Benchmark("pope", "POPE", LAYOUT, read, mark, metrics, 128, ("accuracy", "f1", "yes_ratio"))

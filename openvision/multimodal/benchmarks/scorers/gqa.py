"""GQA, balanced test-dev (Hudson and Manning 2019): short answers, exact match."""

from pathlib import Path

from openvision.multimodal.benchmarks.benchmark import (
    SINGLE_WORD,
    Benchmark,
    Question,
    accuracy,
    find_image,
    first_folder,
    read_json,
)
from openvision.multimodal.benchmarks.scorers.normalise import exact_answer

LAYOUT = "testdev_balanced_questions.json (or questions1.2/testdev_balanced_questions.json) and the folder images"


def read(data: Path) -> list[Question]:
    """All questions, grouped into binary (verify, choose, logical, compare) and open ones (query)."""
    nested = data / "questions1.2" / "testdev_balanced_questions.json"
    rows = read_json(nested if nested.is_file() else data / "testdev_balanced_questions.json", LAYOUT)
    images = first_folder(data, ("images",), LAYOUT)
    return [
        Question(
            id=number,
            image=find_image(images, row["imageId"]),
            prompt=row["question"] + SINGLE_WORD,
            truth=(row["answer"],),
            group="open" if row["types"]["structural"] == "query" else "binary",
        )
        for number, row in rows.items()
    ]


def mark(question: Question, answer: str) -> dict[str, float]:
    """1 for the same words, case and punctuation ignored."""
    return {"right": float(exact_answer(answer) == exact_answer(question.truth[0]))}


GQA = Benchmark("gqa", "GQA", LAYOUT, read, mark, accuracy, 16, ("accuracy",))

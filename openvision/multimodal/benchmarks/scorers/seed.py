"""SEED-Bench, image split (Li et al. 2023): multiple choice with four options, nine dimensions."""

from pathlib import Path

from openvision.multimodal.benchmarks.benchmark import (
    LETTER,
    Benchmark,
    Question,
    accuracy,
    find_image,
    first_folder,
    lettered,
    read_json,
)
from openvision.multimodal.benchmarks.scorers.normalise import letter

LAYOUT = "SEED-Bench.json and the folder SEED-Bench-image"


def read(data: Path) -> list[Question]:
    """The questions about images, without those about videos."""
    content = read_json(data / "SEED-Bench.json", LAYOUT)
    images = first_folder(data, ("SEED-Bench-image", "seed_bench_image"), LAYOUT)
    names = {number: name for name, number in content["question_type"].items()}
    questions = []
    for row in content["questions"]:
        if row["data_type"] == "image":
            choices = tuple(row[f"choice_{option}"] for option in "abcd")
            questions.append(
                Question(
                    id=str(row["question_id"]),
                    image=find_image(images, row["data_id"]),
                    prompt=f"{row['question']}\n{lettered(choices)}{LETTER}",
                    truth=(row["answer"],),
                    group=names[row["question_type_id"]],
                    choices=choices,
                )
            )
    return questions


def mark(question: Question, answer: str) -> dict[str, float]:
    """1 for the correct letter."""
    return {"right": float(letter(answer) == question.truth[0])}


SEED = Benchmark("seed", "SEED-image", LAYOUT, read, mark, accuracy, 16, ("accuracy",))

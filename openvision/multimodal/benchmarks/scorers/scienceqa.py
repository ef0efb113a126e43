"""ScienceQA, the test questions with an image (Lu et al. 2022): multiple choice."""

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

LAYOUT = "problems.json, pid_splits.json and the folder images/test (or test) with one folder for each question"


def read(data: Path) -> list[Question]:
    """Questions of the test split that have an image."""
    problems = read_json(data / "problems.json", LAYOUT)
    images = first_folder(data, ("images/test", "test"), LAYOUT)
    questions = []
    for number in read_json(data / "pid_splits.json", LAYOUT)["test"]:
        row = problems[number]
        if row["image"]:
            context = f"Context: {row['hint']}\n" if row["hint"] else ""
            questions.append(
                Question(
                    id=number,
                    image=find_image(images, f"{number}/{row['image']}"),
                    prompt=f"{context}{row['question']}\n{lettered(row['choices'])}{LETTER}",
                    truth=(chr(ord("A") + row["answer"]),),
                    group=row["subject"],
                    choices=tuple(row["choices"]),
                )
            )
    return questions


def mark(question: Question, answer: str) -> dict[str, float]:
    """1 for the correct letter."""
    return {"right": float(letter(answer) == question.truth[0])}


SCIENCEQA = Benchmark("scienceqa", "ScienceQA-image", LAYOUT, read, mark, accuracy, 16, ("accuracy",))

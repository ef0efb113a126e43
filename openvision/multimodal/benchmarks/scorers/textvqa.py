"""TextVQA (Singh et al. 2019): questions about text in photographs, ten human answers each, soft accuracy."""

from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.multimodal.benchmarks.benchmark import (
    SINGLE_WORD,
    Benchmark,
    Question,
    accuracy,
    find_image,
    first_folder,
    read_json,
)
from openvision.multimodal.benchmarks.scorers.normalise import vqa_answer

LAYOUT = "TextVQA_0.5.1_val.json and the folder train_images (which holds the images of the val split, too)"
_ANSWERS = 10


def read(data: Path) -> list[Question]:
    """The validation split."""
    content = read_json(data / "TextVQA_0.5.1_val.json", LAYOUT)
    images = first_folder(data, ("train_images", "train_val_images/train_images"), LAYOUT)
    questions = []
    for row in content["data"]:
        if len(row["answers"]) != _ANSWERS:
            raise OpenVisionError(
                f"question {row['question_id']} of TextVQA has {len(row['answers'])} answers, not {_ANSWERS}; "
                "download TextVQA_0.5.1_val.json again"
            )
        image, prompt = find_image(images, row["image_id"]), row["question"].capitalize() + SINGLE_WORD
        questions.append(Question(str(row["question_id"]), image, prompt, tuple(row["answers"])))
    return questions


def soft_accuracy(answer: str, humans: tuple[str, ...]) -> float:
    """VQA accuracy, 0 to 1: min(1, agreeing humans / 3), averaged over leaving out each of the ten once."""
    given = vqa_answer(answer)
    agrees = [vqa_answer(human) == given for human in humans]
    total = sum(agrees)
    return sum(min(1.0, (total - agree) / 3) for agree in agrees) / len(humans)


def mark(question: Question, answer: str) -> dict[str, float]:
    """Soft accuracy of one answer."""
    return {"right": soft_accuracy(answer, question.truth)}


TEXTVQA = Benchmark("textvqa", "TextVQA", LAYOUT, read, mark, accuracy, 32, ("accuracy",))

"""ChartQA (Masry et al. 2022): questions about charts, human and generated; numbers may be 5 % off."""

from pathlib import Path

from openvision.multimodal.benchmarks.benchmark import (
    Benchmark,
    Question,
    accuracy,
    find_image,
    first_folder,
    read_json_list,
)

LAYOUT = "the folder test with test_human.json, test_augmented.json and the folder png"
_PROMPT = "\nAnswer the question with a single word."
_TOLERANCE = 0.05


def read(data: Path) -> list[Question]:
    """Both halves of the test split."""
    test = first_folder(data, ("test", "ChartQA Dataset/test"), LAYOUT)
    return [
        Question(
            id=f"{half}-{number}",
            image=find_image(test / "png", row["imgname"]),
            prompt=row["query"] + _PROMPT,
            truth=(row["label"],),
            group=half,
        )
        for half in ("human", "augmented")
        for number, row in enumerate(read_json_list(test / f"test_{half}.json", LAYOUT))
    ]


def relaxed(answer: str, target: str) -> bool:
    """Whether a number is within 5 % of a target other than 0, or else the text is the same; 96% is 0.96."""
    given, wanted = _number(answer), _number(target)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= _TOLERANCE
    return answer.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def mark(question: Question, answer: str) -> dict[str, float]:
    """Relaxed correctness of one answer."""
    return {"right": float(relaxed(answer.strip(), question.truth[0]))}


CHARTQA = Benchmark("chartqa", "ChartQA", LAYOUT, read, mark, accuracy, 16, ("accuracy",))

"""Scorers against examples that can be checked by hand; where one is published, its source is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.multimodal.benchmarks import BENCHMARKS, Question, find_benchmark
from openvision.multimodal.benchmarks.benchmark import tabulate, wilson_interval, with_intervals
from openvision.multimodal.benchmarks.scorers.chartqa import relaxed
from openvision.multimodal.benchmarks.scorers.mme import COGNITION, MME, PERCEPTION
from openvision.multimodal.benchmarks.scorers.mmvet import MMVET, judged
from openvision.multimodal.benchmarks.scorers.normalise import (
    exact_answer,
    letter,
    says_no,
    starts_yes_or_no,
    vqa_answer,
)
from openvision.multimodal.benchmarks.scorers.ocrbench import OCRBENCH, contains
from openvision.multimodal.benchmarks.scorers.pope import POPE
from openvision.multimodal.benchmarks.scorers.scienceqa import SCIENCEQA
from openvision.multimodal.benchmarks.scorers.seed import SEED
from openvision.multimodal.benchmarks.scorers.textvqa import soft_accuracy


def numbers(benchmark, questions, answers):
    """Metrics of answers in the order of the questions."""
    marks = tabulate(benchmark, questions, dict(zip([q.id for q in questions], answers, strict=True)))
    return benchmark.metrics(marks, np.ones(len(marks)))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")


# --- TextVQA and VQA -----


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        # facebookresearch/mmf, tests/datasets/test_processors.py, test_evalai_answer_processor
        ("two", "2"),
        ("a building", "building"),
        ("snow, mountain", "snow mountain"),
        ("isnt", "isn't"),
        ("the two mountain's \t \n   ", "2 mountain 's"),
        # By the rules of GT-Vision-Lab/VQA, vqaEval.py: a period goes unless a digit follows; marks beside a space
        # vanish, others part words; a comma between digits makes all marks vanish.
        ("St. Mary", "st mary"),
        ("$3.50", "$3.50"),
        ("yes/no", "yes no"),
        ("yes / no", "yes  no".replace("  ", " ")),
        ("1,000", "1000"),
        ("None", "0"),
        ("Don't", "don't"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
    ],
)
def test_vqa_normalisation(text, normalised):
    assert vqa_answer(text) == normalised


@pytest.mark.parametrize(
    ("agreeing", "accuracy"),
    # Of ten humans k agree; one of the k left out leaves k - 1: (k min(1, (k-1)/3) + (10-k) min(1, k/3)) / 10.
    # The definition: visualqa.org/evaluation.html, averaged over the ten sets of nine humans.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_soft_accuracy(agreeing, accuracy):
    humans = ("Nokia",) * agreeing + tuple(f"other {number}" for number in range(10 - agreeing))
    assert soft_accuracy("nokia.", humans) == pytest.approx(accuracy)


# --- ChartQA -----


def test_chartqa_example_of_pix2struct():
    # google-research/pix2struct, metrics_test.py, test_pix2struct_metrics: relaxed accuracy 62.5.
    answers = ["abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"]
    targets = ["abc", "Abc", "abc", "96%", "94%", "0.96", "0.94", "Won't"]
    right = [relaxed(answer, target) for answer, target in zip(answers, targets, strict=True)]
    assert right == [True, True, True, True, False, True, False, False]
    assert 100 * sum(right) / len(right) == 62.5


def test_chartqa_zero_must_be_exact():
    assert relaxed("0", "0")
    assert not relaxed("0.01", "0")


# --- OCRBench -----


def test_ocrbench_examples():
    # Yuliang-Liu/MultimodalOCR, OCRBench.json: answers of IIIT5K 2843, STVQA 7 and HME100k 14413; rule of example.py.
    assert contains("The word is 'Centre'.", ("CENTRE",), formula=False)
    assert contains("to Chatswood, Epping", ("Chatswood Epping", "Chatswood, Epping"), formula=False)
    assert not contains("Chatswood", ("Chatswood Epping", "Chatswood, Epping"), formula=False)
    truths = ("y _ { 2 } = - 1\n", "y_2 = - 1\n")
    assert contains("$y_{2}=-1$", truths, formula=True)
    assert not contains("Y_2=-1", truths, formula=True)


def test_ocrbench_counts_by_task():
    groups = ["Regular Text Recognition", "Handwriting Recognition", "Doc-oriented VQA"]
    questions = [Question(str(i), Path(str(i)), "?", ("word",), group) for i, group in enumerate(groups)]
    found = numbers(OCRBENCH, questions, ["word", "a word", "nothing"])
    assert (found["score"], found["score/text recognition"], found["score/document VQA"]) == (2, 2, 0)


# --- MME -----


def mme_questions(task: str, pictures: int) -> list[Question]:
    return [
        Question(f"{task}/{i}/{j}", Path(f"{task}{i}"), "?", (truth,), task, f"{task}/{i}")
        for i in range(pictures)
        for j, truth in enumerate(("yes", "no"))
    ]


def test_mme_adds_accuracy_and_accuracy_plus():
    # Four answers right of six: accuracy 66.67. One picture of three with both right: accuracy+ 33.33. (Fu et al., 2.3)
    answers = ["Yes", "No", "yes.", "yes", "no", "no, it is not"]
    found = numbers(MME, mme_questions("existence", 3), answers)
    assert found["points/existence"] == pytest.approx(100.0)
    assert found["perception"] == pytest.approx(100.0)
    assert found["cognition"] == 0


def test_mme_sums_to_2000_and_800():
    questions = [question for task in (*PERCEPTION, *COGNITION) for question in mme_questions(task, 2)]
    found = numbers(MME, questions, [question.truth[0] for question in questions])
    assert (found["perception"], found["cognition"]) == (2000, 800)


def test_mme_reads_first_four_characters():
    # The official calculation.py: yes or no alone, else by the first four characters, else "other", which is wrong.
    said = [starts_yes_or_no(text) for text in ("Yes", "No.", "yes, it is", "Not", "I think yes", "", "n")]
    assert said == ["yes", "no", "yes", "no", "other", "other", "no"]


# --- POPE -----


def test_pope_reads_the_first_sentence():
    # AoiDragon/POPE, evaluate.py: "No", "no" or "not" among the words of the first sentence; anything else is yes.
    said = [
        says_no(text)
        for text in (
            "No, there is no car.",
            "There is not.",
            "Yes. There is no doubt.",
            "NO",
            "yes",
            "nothing",
            "I do not know",
        )
    ]
    assert said == [True, True, False, False, False, False, True]


def test_pope_example():
    # Labels of the first six questions of coco_pope_random.json: yes no yes no yes no.
    labels = ["yes", "no", "yes", "no", "yes", "no"]
    questions = [Question(str(i), Path("a"), "?", (label,), "random") for i, label in enumerate(labels)]
    found = numbers(POPE, questions, ["yes", "yes", "no", "no", "yes", "no"])
    # TP 2, FP 1, TN 2, FN 1
    expected = {"accuracy": 400 / 6, "precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3, "yes_ratio": 50.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_pope_averages_over_the_three_ways():
    questions = [Question(f"{way}{i}", Path("a"), "?", ("yes",), way) for way in ("random", "popular") for i in (0, 1)]
    found = numbers(POPE, questions, ["yes", "yes", "no", "no"])
    assert (found["accuracy"], found["f1/random"], found["f1/popular"], found["f1"]) == (50, 100, 0, 50)


# --- multiple choice, GQA, MM-Vet -----


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        # haotian-liu/LLaVA, eval_science_qa.py: the letter, "A. ...", or one "The answer is A."
        ("A", "A"),
        ("B. Louisiana", "B"),
        ("The answer is C.", "C"),
        ("FAILED", None),
        ("The answer is A. The answer is B.", None),
        # lmms-eval also takes a small letter.
        ("d", "D"),
        ("(A)", "A"),
        ("A dog", None),
        ("", None),
    ],
)
def test_letters(answer, choice):
    assert letter(answer) == choice


def test_gqa_ignores_case_and_final_period():
    # haotian-liu/LLaVA, convert_gqa_for_eval.py strips the period and lowers; lmms-eval drops all punctuation.
    assert exact_answer("On the left.") == exact_answer("on the left")
    assert exact_answer("blue") != exact_answer("dark blue")


def test_mmvet_export_and_grades():
    questions = [
        Question("v1_0", Path("a"), "What is x?", ("-1 <AND> -5",), "math ocr"),
        Question("v1_1", Path("b"), "?", ("x",), "rec"),
    ]
    assert MMVET.export is not None
    assert MMVET.export(questions, {"v1_0": "x = -1", "v1_1": "y"}) == {"v1_0": "x = -1", "v1_1": "y"}
    # Grade 0.5 for "x = -1" is the example of the judge's prompt in yuweihao/MM-Vet, mm-vet_evaluator.py.
    scores = judged(questions, {"v1_0": {"score": [0.5]}, "v1_1": {"score": [1.0]}})
    assert scores == {"total": 75.0, "rec": 100.0, "ocr": 50.0, "math": 50.0}
    with pytest.raises(OpenVisionError, match="v1_1"):
        judged(questions, {"v1_0": {"score": [0.5]}})


# --- files as they are distributed -----


def write_layouts(root: Path) -> None:
    """One question of every benchmark in its official layout."""
    ten = [{"question": "what is the brand?", "image_id": "0054c91397f2fe05", "question_id": 1, "answers": ["x"] * 10}]
    write(root / "textvqa/TextVQA_0.5.1_val.json", {"data": ten})
    picture(root / "textvqa/train_images/0054c91397f2fe05.jpg")
    for half in ("human", "augmented"):
        write(root / f"chartqa/test/test_{half}.json", [{"imgname": "1.png", "query": "How many?", "label": "14"}])
    picture(root / "chartqa/test/png/1.png")
    word = {"image_path": "IIIT5K/test/918_1.png", "question": "what is written in the image?", "answers": "CENTRE"}
    write(root / "ocrbench/OCRBench/OCRBench.json", [{**word, "type": "Regular Text Recognition"}])
    picture(root / "ocrbench/OCRBench_Images/IIIT5K/test/918_1.png")
    text = "Is there a cat? Please answer yes or no.\tYes\nIs there a dog? Please answer yes or no.\tNo\n"
    for task in PERCEPTION + COGNITION:
        folder = root / "mme/MME_Benchmark_release_version" / task
        texts = folder / "questions_answers_YN" if task == "artwork" else folder
        picture((folder / "images" if task == "artwork" else folder) / "1.jpg")
        texts.mkdir(exist_ok=True)
        (texts / "1.txt").write_text(text)
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four", "answer": "A"}
    row = {**choices, "question": "How many towels are in the image?", "question_id": "101669", "question_type_id": 5}
    rows = [
        {**row, "data_id": "1454426_2591111986", "data_type": "image"},
        {**row, "data_id": "v", "data_type": "video"},
    ]
    write(root / "seed/SEED-Bench.json", {"questions": rows, "question_type": {"Instances Counting": 5}})
    picture(root / "seed/SEED-Bench-image/1454426_2591111986")
    problem = {
        "question": "Farthest north?",
        "choices": ["West Virginia", "Louisiana"],
        "answer": 0,
        "subject": "social",
    }
    write(
        root / "scienceqa/problems.json",
        {"1": {**problem, "hint": "A map.", "image": "image.png"}, "2": {**problem, "hint": "", "image": None}},
    )
    write(root / "scienceqa/pid_splits.json", {"test": ["1", "2"]})
    picture(root / "scienceqa/images/test/1/image.png")
    gqa = {"question": "Is it red?", "imageId": "n1", "answer": "yes", "types": {"structural": "verify"}}
    write(root / "gqa/testdev_balanced_questions.json", {"201": gqa})
    picture(root / "gqa/images/n1.jpg")
    line = {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a snowboard in the image?", "label": "yes"}
    for way in ("random", "popular", "adversarial"):
        write(root / f"pope/coco/coco_pope_{way}.json", line)
    picture(root / "pope/val2014/COCO_1.jpg")
    vet = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1 <AND> -5", "capability": ["ocr", "math"]}
    write(root / "mmvet/mm-vet.json", {"v1_0": vet})
    picture(root / "mmvet/images/v1_0.png")
    drawn = {"id": "0", "image": "../images/a.png", "kind": "yes/no", "question": "Is there a cat?", "answer": "no"}
    write(root / "pictures/questions.json", [drawn])
    picture(root / "images/a.png")


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    write_layouts(root)
    return root


@pytest.mark.parametrize("name", BENCHMARKS)
def test_official_layout_is_read_and_a_true_answer_scores_full(layouts, name):
    benchmark = find_benchmark(name)
    questions = benchmark.read(layouts / name)
    expected = {"mme": 28, "pope": 3, "chartqa": 2}
    assert len(questions) == expected.get(name, 1)
    assert all(question.image.is_file() for question in questions)
    found = numbers(benchmark, questions, [question.truth[0] for question in questions])
    for metric in set(benchmark.headline) - {"yes_ratio", "open"}:
        # One question of OCRBench is one point of its thousand.
        assert found[metric] == (1.0 if name == "ocrbench" else benchmark.top.get(metric, 100.0))


def test_prompts(layouts):
    def prompt(name):
        return find_benchmark(name).read(layouts / name)[0].prompt

    assert prompt("textvqa") == "What is the brand?\nAnswer the question using a single word or phrase."
    assert prompt("mme") == "Is there a cat?\nAnswer the question using a single word or phrase."
    letters = "\nAnswer with the option's letter from the given choices directly."
    assert prompt("seed") == f"How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four{letters}"
    assert prompt("scienceqa") == f"Context: A map.\nFarthest north?\nA. West Virginia\nB. Louisiana{letters}"
    assert SEED.read(layouts / "seed")[0].group == "Instances Counting"
    assert SCIENCEQA.read(layouts / "scienceqa")[0].truth == ("A",)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_wrong_folder_is_told_with_what_it_must_hold(tmp_path, name):
    with pytest.raises(OpenVisionError, match=r"must hold|lacks"):
        find_benchmark(name).read(tmp_path)


def test_unknown_benchmark_lists_all():
    with pytest.raises(OpenVisionError, match="textvqa, chartqa"):
        find_benchmark("vqa")


# --- intervals -----


def test_interval_knows_that_questions_share_pictures():
    def width(pictures):
        questions = [Question(str(i), Path(str(i % pictures)), "?", ("yes",), "x") for i in range(200)]
        answers = {str(i): "yes" if (i % pictures) % 2 else "no" for i in range(200)}
        benchmark = find_benchmark("gqa")
        number = with_intervals(benchmark, tabulate(benchmark, questions, answers))["accuracy"]
        assert number["value"] == 50
        return number["high"] - number["low"]

    assert width(20) > 2.5 * width(200)
    # A binomial share of 200: 1.96 x sqrt(0.25 / 200) to each side.
    assert width(200) == pytest.approx(200 * 1.96 * (0.25 / 200) ** 0.5, rel=0.1)


def test_interval_of_all_wrong_is_not_a_point():
    questions = [Question(str(i), Path(str(i)), "?", ("yes",), "x") for i in range(50)]
    benchmark = find_benchmark("gqa")
    answers = {str(i): "no" for i in range(50)}
    number = with_intervals(benchmark, tabulate(benchmark, questions, answers))["accuracy"]
    assert number["low"] == 0
    assert 5 < number["high"] < 8


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Known values of the Wilson score interval without continuity correction, 95 %.
    [(50, 100, 0.40383, 0.59617), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (1, 400, 0.00044, 0.01401)],
)
def test_wilson_interval(hits: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(hits, total) == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize("total", [1, 7, 12, 390, 10**6])
def test_wilson_interval_holds_its_share(total: int) -> None:
    for hits in {0, 1, total // 3, total - 1, total}:
        low, high = wilson_interval(hits, total)
        assert 0 <= low <= hits / total <= high <= 1


def test_wilson_interval_of_nothing() -> None:
    with pytest.raises(OpenVisionError, match="0 hits out of 0"):
        wilson_interval(0, 0)

"""The runner: answers on disk, resume, refusing to mix runs; lmms-eval's plug-in; published tables."""

import json
import shutil
import sys
import types
from typing import Any

import pytest
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.multimodal.benchmarks import find_benchmark
from openvision.multimodal.benchmarks.reported import find_reported, tables
from openvision.multimodal.benchmarks.runner import (
    ANSWERS,
    RESULT,
    Options,
    fingerprint,
    load_answerer,
    run_benchmark,
    sample_questions,
)

PICTURES = find_benchmark("pictures")


@pytest.fixture
def data(tmp_path):
    """Ten questions about five images."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(10):
        name = f"{number // 2}.png"
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / name)
        kind, answer = ("yes/no", "yes") if number % 2 else ("colour", "red")
        rows.append(
            {"id": str(number), "image": name, "kind": kind, "question": f"Question {number}?", "answer": answer}
        )
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder


class Scripted:
    """Answers "yes" to everything, and falls over after so many batches."""

    def __init__(self, batches: int | None = None) -> None:
        self.left, self.asked = batches, []

    def __call__(self, images, prompts, max_new_tokens):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        assert all(image.mode == "RGB" for image in images)
        self.asked += prompts
        return ["Yes." for _ in prompts]


def test_answers_and_numbers_are_written(data, tmp_path):
    result = run_benchmark(PICTURES, data, Scripted, {"model": "m"}, tmp_path / "out")
    assert result["metrics"]["yes_no"]["value"] == 100
    assert result["metrics"]["open"]["value"] == 0
    assert result["images"] == 5
    lines = [json.loads(line) for line in (tmp_path / "out" / ANSWERS).read_text().splitlines()]
    assert {line["id"] for line in lines} == {str(number) for number in range(10)}
    assert lines[0].keys() == {"id", "answer", "prompt", "truth"}
    assert json.loads((tmp_path / "out" / RESULT).read_text()) == result


def test_resumes_where_it_stopped(data, tmp_path):
    out, options = tmp_path / "out", Options(batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(PICTURES, data, lambda: Scripted(2), {"model": "m"}, out, options)
    with open(out / ANSWERS, "a") as file:
        file.write('{"id": "9", "ans')  # what kill -9 may leave
    rest = Scripted()
    result = run_benchmark(PICTURES, data, lambda: rest, {"model": "m"}, out, options)
    assert len(rest.asked) == 6
    assert result["questions"] == 10
    assert len((out / ANSWERS).read_text().splitlines()) == 10
    # All answers are there: the model is not even loaded.
    again = run_benchmark(PICTURES, data, lambda: pytest.fail("loaded"), {"model": "m"}, out, options)
    assert again["metrics"] == result["metrics"]


def test_another_run_in_the_same_folder_is_refused(data, tmp_path):
    run_benchmark(PICTURES, data, Scripted, {"model": "m"}, tmp_path / "out")
    with pytest.raises(OpenVisionError, match="model differ"):
        run_benchmark(PICTURES, data, Scripted, {"model": "other"}, tmp_path / "out")
    with pytest.raises(OpenVisionError, match="questions_sha256"):
        run_benchmark(PICTURES, data, Scripted, {"model": "m"}, tmp_path / "out", Options(limit=4))


def test_limit_samples_whole_images_and_always_the_same(data):
    questions = PICTURES.read(data)
    sampled = sample_questions(questions, 4)
    assert len(sampled) == 4
    assert len({question.image for question in sampled}) == 2
    assert sampled == sample_questions(questions, 4)
    assert sample_questions(questions, 99) == questions


def test_a_broken_image_is_named(data, tmp_path):
    (data / "0.png").write_bytes(b"no picture")
    with pytest.raises(OpenVisionError, match=r"0\.png cannot be read"):
        run_benchmark(PICTURES, data, Scripted, {"model": "m"}, tmp_path / "out")


def test_no_folder(tmp_path):
    with pytest.raises(OpenVisionError, match="is not a folder"):
        run_benchmark(PICTURES, tmp_path / "none", Scripted, {"model": "m"}, tmp_path / "out")


def test_fingerprint_sees_weights(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    before = fingerprint(tmp_path)
    # Answers that are written into the model's folder are no part of it.
    for place in ("scores/mme", "mine"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "result.json").write_text("{}")
    assert fingerprint(tmp_path, tmp_path / "mine") == before
    (tmp_path / "a.safetensors").write_bytes(b"1235")
    assert fingerprint(tmp_path, tmp_path / "mine") != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "yes/no", "answer": "cat"}, "question 1 is of kind 'yes/no', and its answer 'cat' is neither"),
        ({"kind": "polar", "answer": "Yes"}, "question 1 is answered by yes or no, and its kind is 'polar'; write"),
        ({"kind": 3}, "question 1 needs id, image, kind, question, answer, each a text that is not empty"),
    ],
)
def test_questions_of_another_form_are_named(tmp_path, change, message):
    question = {"id": "0", "image": "a.png", "kind": "colour", "question": "Which?", "answer": "red"} | change
    (tmp_path / "questions.json").write_text(json.dumps([question]))
    with pytest.raises(OpenVisionError, match=message):
        PICTURES.read(tmp_path)


def test_yes_is_yes_in_any_case(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    question = {"id": "0", "image": "a.png", "kind": "Yes/No ", "question": "Is it?", "answer": "Yes"}
    (tmp_path / "questions.json").write_text(json.dumps([question]))
    (read,) = PICTURES.read(tmp_path)
    assert PICTURES.mark(read, "yes.") == {"right": 1.0, "yes": 1.0}
    assert PICTURES.mark(read, "No") == {"right": 0.0, "yes": 0.0}


def test_a_model_answers_in_batches_as_alone(model_folder):
    answer = load_answerer(model_folder, "cpu", "float32")
    images = [Image.new("RGB", (20 + 10 * number, 30), (40 * number, 90, 10)) for number in range(3)]
    prompts = ["What is this?", "Is there a cat in this picture or not?", "Why?"]
    together = answer(images, prompts, 6)
    assert together == [answer([i], [p], 6)[0] for i, p in zip(images, prompts, strict=True)]


def test_blind_answers_do_not_depend_on_the_image(model_folder):
    blind = load_answerer(model_folder, "cpu", "float32", blind=True)
    black, white = (Image.new("RGB", (40, 40), colour) for colour in ("black", "white"))
    assert blind([black], ["What is this?"], 6) == blind([white], ["What is this?"], 6)


def test_command_scores_a_model(model_folder, data, tmp_path):
    from typer.testing import CliRunner

    from openvision.cli.main import app

    arguments = [
        "vlm",
        "eval",
        str(model_folder),
        "--benchmark",
        "pictures",
        "--data",
        str(data),
    ]
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    arguments[2] = str(copy)
    # Twice: the answers of the first time lie in the model's folder.
    for _ in range(2):
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        assert "10 questions about 5 images" in done.output
        assert (copy / "scores" / "pictures" / RESULT).is_file()


# --- lmms-eval, by a stand-in of the interface its documentation describes (docs/guides/model_guide.md) -----


class Request:
    """lmms_eval.api.instance.Instance as a simple model sees it: args of six."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture
def lmms_eval(monkeypatch):
    """Modules of the names our plug-in looks up; lmms-eval itself is not installed here."""

    class Base:
        is_simple = True

        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

    class Manifest:
        def __init__(self, model_id, simple_class_path=None, chat_class_path=None, aliases=()) -> None:
            self.model_id, self.simple_class_path = model_id, simple_class_path

    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    model = types.ModuleType("lmms_eval.api.model")
    registry = types.ModuleType("lmms_eval.models.registry_v2")
    vars(model)["lmms"], vars(registry)["ModelManifest"] = Base, Manifest
    monkeypatch.setitem(sys.modules, model.__name__, model)
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    return Base


def test_lmms_eval_runs_a_model(lmms_eval, model_folder):
    import importlib

    from openvision.multimodal.benchmarks import lmms

    manifest = lmms.manifest()
    # As lmms-eval's registry resolves a class path.
    module, _, name = manifest.simple_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, lmms_eval)
    model = found(pretrained=str(model_folder), device="cpu", batch_size="2", dtype="float32")
    images = [Image.new("RGB", (30, 30), (0, 60 * number, 0)) for number in range(3)]
    model.task_dict = {"mme": {"test": [{"image": image} for image in images]}}
    settings = [{"max_new_tokens": 4}, {"max_new_tokens": 2, "until": "\n"}, {"max_new_tokens": 4}]
    requests = [
        Request(f"Is it {number}?", settings[number], lambda row: [row["image"]], number, "mme", "test")
        for number in range(3)
    ]
    answers = model.generate_until(requests)
    alone = load_answerer(model_folder, "cpu", "float32")
    for number, new_tokens in enumerate((4, 2, 4)):
        expected = alone([images[number]], [f"Is it {number}?"], new_tokens)[0]
        assert answers[number] == (expected.split("\n")[0].strip() if number == 1 else expected)
    with pytest.raises(NotImplementedError, match="generate"):
        model.loglikelihood([])


# --- published tables -----


def test_reported_cells():
    # OpenVision (arXiv 2505.04601), Table 1: OpenVision L/14 at 336 px.
    cells = {row.model: row.value for row in find_reported("mme", "Table 1") if "OpenVision (" in row.table}
    assert cells["OpenVision L/14 336 px"] == "1525/315"
    assert [row.value for row in find_reported("textvqa", "Qwen2.5")] == ["33.5", "34.8", "38.2", "32.8", "27.4"]
    assert find_reported("mmvet", "OpenVision 2 L/14") == []


def test_reported_values_are_possible():
    top = {"ocrbench": 1000.0, "mme.perception": 2000.0, "mme.cognition": 800.0}
    for table in tables():
        for row in table.rows.values():
            assert row
            for column, score in row.items():
                assert find_benchmark(column.partition(".")[0])
                assert 0 < score <= top.get(column, 100.0)

"""Answers: batches, streams, conversations, the command."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.multimodal.data.conversation import Turn
from openvision.multimodal.model.generate import Assistant, Decoding, Prompt, converse, load_assistant, render_prompt
from openvision.untrusted import printable

RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 70), "blue")
SHORT = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module", params=["model_folder", "next_folder", "native_folder"])
def assistant(request) -> Assistant:
    return load_assistant(request.getfixturevalue(request.param), "cpu")


@pytest.fixture
def one(model_folder) -> Assistant:
    return load_assistant(model_folder, "cpu")


def test_batches_answer_as_single_questions_do(assistant) -> None:
    questions = [
        Prompt("What is it?", (RED,)),
        Prompt("Hello there, how are you today?"),
        Prompt("A colour?", (BLUE,)),
        Prompt("Same?", (RED, BLUE)),
        Prompt("Hi."),
    ]
    alone = [assistant.answer([question], SHORT)[0] for question in questions]
    assert assistant.answer(questions, Decoding(max_new_tokens=6, batch_size=3)) == alone
    assert any(alone)


def test_images_are_seen(one) -> None:
    def logits(image):
        with torch.inference_mode():
            return one.model(**one.prepare([Prompt("What?", (image,))])).logits

    assert not torch.allclose(logits(RED), logits(BLUE))
    assert torch.equal(logits(RED), logits(RED))


def test_a_stream_is_the_answer(one) -> None:
    question = Prompt("What is it?", (RED,))
    assert "".join(one.stream(question, SHORT)).strip() == one.answer([question], SHORT)[0]


def test_a_failing_stream_fails(one, monkeypatch) -> None:
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(one.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(one.stream(Prompt("What?", (RED,)), SHORT))


def test_no_image_token_is_ever_written(one) -> None:
    image_token = one.model.config.image_token_id
    with torch.no_grad():
        one.model.lm_head.weight.zero_()
        one.model.lm_head.weight[image_token] = 0
    bias = torch.zeros(one.model.config.text_config.vocab_size)
    bias[image_token] = 1e4
    one.model.lm_head.bias = torch.nn.Parameter(bias)
    inputs = one.prepare([Prompt("Hm?")])
    made = one.model.generate(**inputs, max_new_tokens=3)
    assert image_token not in made[0, inputs["input_ids"].shape[1] :]


def test_prompts(one) -> None:
    tokenizer = one.processor.tokenizer
    history = (Turn("user", "Who?"), Turn("assistant", "A dog."))
    assert render_prompt(Prompt("Sure?", (RED,), history, "Be brief."), tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(OpenVisionError, match="is reserved for images"):
        render_prompt(Prompt("What is <image>?"), tokenizer)


def test_a_conversation_remembers(one, monkeypatch) -> None:
    asked: list[Prompt] = []

    def stream(question, decoding):
        asked.append(question)
        yield from ("It", " is.")

    monkeypatch.setattr(one, "stream", stream)
    written: list[str] = []
    turns = converse(one, RED, ["Who?", " ", "/new", "What?", "Sure?"], SHORT, written.append)
    assert [question.text for question in asked] == ["Who?", "What?", "Sure?"]
    assert [len(question.history) for question in asked] == [0, 0, 2]
    assert turns[-1] == Turn("assistant", "It is.")
    assert "".join(written).count("It is.\n") == 3


def run(*arguments: object, **settings):
    return CliRunner().invoke(app, ["vlm", "chat", *map(str, arguments)], **settings)


def test_the_command(model_folder, tmp_path) -> None:
    RED.save(tmp_path / "red.png")
    once = run(model_folder, tmp_path / "red.png", "--prompt", "What?", "--max-new-tokens", 4)
    assert once.exit_code == 0, once.output
    assistant = load_assistant(model_folder, "cpu")
    answer = assistant.answer([Prompt("What?", (RED,))], Decoding(max_new_tokens=4))[0]
    assert once.output.strip() == printable(answer)
    talked = run(model_folder, tmp_path / "red.png", "--max-new-tokens", 4, input="What?\nSure?\n\n")
    assert talked.exit_code == 0, talked.output
    assert talked.output.count("> ") == 3


def test_bad_input(model_folder, llm_folder, tmp_path) -> None:
    RED.save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    for arguments, message in (
        ((model_folder, tmp_path / "none.png"), "is not a readable image"),
        ((model_folder, tmp_path / "broken.png"), "is not a readable image"),
        ((tmp_path / "nothing", tmp_path / "red.png"), "nothing does not exist; build one with"),
        ((llm_folder, tmp_path / "red.png"), "holds no LLaVA model"),
    ):
        result = run(*arguments, "--prompt", "What?")
        assert isinstance(result.exception, OpenVisionError), result.output
        assert message in str(result.exception)

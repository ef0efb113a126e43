"""Conversations: the loss falls on answers, token by token; what is refused; images to pixels; batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.multimodal.data.batching import Collator, SampleOrder
from openvision.multimodal.data.conversation import IGNORED, SampleError, parse_conversation, tokenize
from openvision.multimodal.data.dataset import (
    ConversationDataset,
    Item,
    ReadOptions,
    read_hub_dataset,
    read_llava_json,
    read_rows,
)
from openvision.multimodal.model.generate import Assistant, load_assistant
from tests.multimodal import tiny


@pytest.fixture(scope="module")
def assistant(model_folder) -> Assistant:
    return load_assistant(model_folder, "cpu")


@pytest.fixture(scope="module")
def next_assistant(next_folder) -> Assistant:
    return load_assistant(next_folder, "cpu")


def open_data(assistant: Assistant, folder: Path, **settings) -> ConversationDataset:
    collection = read_llava_json([folder / "train.json"], folder / "images")
    aspect = "anyres" if assistant.geometry.pinpoints else "pad"
    settings = {"aspect": aspect, "max_length": 400} | settings
    return ConversationDataset(collection.samples, assistant.processor, assistant.geometry, **settings)


def row(*texts: str, **more) -> dict:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": "x7", "conversations": turns} | more


def encoded(sample, tokenizer, counts=(), max_length=400):
    image = tokenizer.convert_tokens_to_ids("<image>")
    return tokenize(sample, tokenizer, image, [[image] * count for count in counts], max_length)


# Answers only.


def test_the_loss_falls_on_answers_token_by_token(assistant) -> None:
    tokenizer = assistant.processor.tokenizer
    sample = parse_conversation(row("<image>\nWho?", "A dog.", "Sure?", "Yes"), "x7", 1)
    made = encoded(sample, tokenizer, [3])
    image, start, end = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<image>", "<|im_start|>", "<|im_end|>"))

    def letters(text):
        return [tokenizer.convert_tokens_to_ids(letter) for letter in tokenizer.tokenize(text)]

    # Every token of the text, and whether it is learnt: the answer and its end, nothing else, not even the line end.
    expected = [
        *((token, False) for token in [start, *letters("user\n"), image, image, image, *letters("\nWho?"), end]),
        *((token, False) for token in [*letters("\n"), start, *letters("assistant\n")]),
        *((token, True) for token in [*letters("A dog."), end]),
        *((token, False) for token in [*letters("\n"), start, *letters("user\nSure?"), end, *letters("\n")]),
        *((token, False) for token in [start, *letters("assistant\n")]),
        *((token, True) for token in [*letters("Yes"), end]),
        *((token, False) for token in letters("\n")),
    ]
    assert made.input_ids == [token for token, _ in expected]
    assert made.labels == [token if learnt else IGNORED for token, learnt in expected]


def test_the_prompt_in_training_is_the_prompt_at_inference(assistant) -> None:
    sample = parse_conversation(row("<image>\nWho is it?", "A dog."), "x7", 1)
    made = encoded(sample, assistant.processor.tokenizer, [assistant.geometry.patches])
    first = next(index for index, label in enumerate(made.labels) if label != IGNORED)
    content = [{"type": "image", "image": Image.new("RGB", (9, 9))}, {"type": "text", "text": "Who is it?"}]
    stock = assistant.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert made.input_ids[:first] == stock["input_ids"][0]


def test_a_system_message_is_context(assistant) -> None:
    turns = [{"role": "system", "content": "Be brief."}, *({"role": "user", "content": "Hm?"},)]
    turns.append({"role": "assistant", "content": "Ok."})
    made = encoded(parse_conversation({"messages": turns}, "x7", 0), assistant.processor.tokenizer)
    learnt = [token for token in made.labels if token != IGNORED]
    assert assistant.processor.tokenizer.decode(learnt) == "Ok.<|im_end|>"


def test_whitespace_inside_an_answer_is_learnt(assistant) -> None:
    made = encoded(parse_conversation(row("Hm?", " a\n\n b \n"), "x7", 0), assistant.processor.tokenizer)
    learnt = [token for token in made.labels if token != IGNORED]
    assert assistant.processor.tokenizer.decode(learnt) == " a\n\n b \n<|im_end|>"


def test_the_image_token_moves_to_the_front_as_in_llava() -> None:
    assert parse_conversation(row("What?\n<image>", "It."), "x7", 1).turns[0].text == "<image>\nWhat?"
    assert (
        parse_conversation(row("What?\n<image>", "It."), "x7", 1, image_first=False).turns[0].text == "What?\n<image>"
    )


def test_loose_ends_are_dropped_as_in_llava() -> None:
    turns = [{"from": "gpt", "value": "Hi."}, *row("A?", "B.", "C?")["conversations"]]
    assert [turn.text for turn in parse_conversation({"conversations": turns}, "x7", 0).turns] == ["A?", "B."]


@pytest.mark.parametrize(
    ("given", "images", "message"),
    [
        (row("What?", "It."), 1, "1 image but no <image>"),
        (row("<image><image> What?", "It."), 1, "2 <image> for 1 image; "),
        (row("<image> What?", "It."), 0, "1 <image> for 0 images"),
        (row("<image> What?", "It."), 2, "2 images but only 1 <image>"),
        (row("<image> What?", "It is <image>."), 2, "<image> in an answer or system message"),
        (row("What?", "  "), 0, "message 2 is an empty answer"),
        (row(" ", "It."), 0, "message 1 is an empty user message"),
        (row("What?"), 0, "no question with an answer"),
        ({"id": "x7"}, 0, "no list named conversations"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, 0, "message 1 needs a speaker"),
        ({"conversations": [{"from": "human", "value": 3}]}, 0, "message 1 needs a speaker"),
        ({"conversations": [*row("A?", "B.")["conversations"], {"from": "gpt", "value": "C."}]}, 0, "do not alternate"),
    ],
)
def test_bad_samples_are_refused_by_name(given, images, message) -> None:
    with pytest.raises(SampleError) as error:
        parse_conversation(given, "x7", images)
    assert message in str(error.value)
    assert "sample x7" in str(error.value)


def test_cut_off(assistant) -> None:
    tokenizer = assistant.processor.tokenizer
    sample = parse_conversation(row("<image>\nWho?", "A dog."), "x7", 1)
    whole = encoded(sample, tokenizer, [3])
    short = encoded(sample, tokenizer, [3], len(whole.input_ids) - 5)
    assert short.input_ids == whole.input_ids[:-5]
    with pytest.raises(SampleError, match="x7: its image does not fit"):
        encoded(sample, tokenizer, [401])
    answer = next(place for place, label in enumerate(whole.labels) if label != -100)
    with pytest.raises(SampleError, match="x7: no answer within"):
        encoded(sample, tokenizer, [3], answer)


# Files and images.


def test_missing_and_broken_images_are_counted(assistant, data_folder, tmp_path) -> None:
    rows = json.loads((data_folder / "train.json").read_text())[:3]
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes((data_folder / "images" / "0.png").read_bytes())
    (images / "1.png").write_bytes(b"no picture")
    (tmp_path / "train.json").write_text(json.dumps(rows))
    options = ReadOptions(rejects=tmp_path / "rejects.jsonl")
    collection = read_llava_json([tmp_path / "train.json"], images, options)
    assert len(collection.samples) == 2
    assert collection.report() == ["samples dropped, image missing: 1"]
    data = ConversationDataset(collection.samples, assistant.processor, assistant.geometry, "pad", 400, options)
    # The next sample takes the place of the broken one.
    assert data[1]["input_ids"] == data[0]["input_ids"]
    assert data.replaced == {"image unreadable": 1}
    named = [json.loads(line)["id"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert named == ["s2", "s1"]


def test_bad_samples_stop_or_are_skipped(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row("What?", "")) + "\n" + json.dumps(row("What?", "It.")) + "\n")
    with pytest.raises(SampleError, match="x7"):
        read_llava_json([tmp_path / "a.jsonl"], tmp_path)
    collection = read_llava_json([tmp_path / "a.jsonl"], tmp_path, ReadOptions(skip_bad=True))
    assert (len(collection.samples), collection.dropped) == (1, {"unusable": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("{}", "must be a JSON list"), ("[]", "no usable sample"), (None, "cannot be read")],
)
def test_bad_files(tmp_path, text, message) -> None:
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(OpenVisionError, match=message):
        read_llava_json([tmp_path / "a.json"], tmp_path)


def test_rows_of_a_data_set(assistant) -> None:
    image = Image.new("L", (30, 20), 90)
    rows = [row("<image>\nWhat?", "It.", image=image), row("<image><image>Same?", "No.", images=[image, image])]
    rows.append(row("Hm?", "Ok.", image=None))
    collection = read_rows(rows)
    data = ConversationDataset(collection.samples, assistant.processor, assistant.geometry, "pad", 400)
    assert [len(data[index].get("pixel_values", [])) for index in range(3)] == [1, 2, 0]
    assert sum(token == assistant.processor.image_token_id for token in data[1]["input_ids"]) == 50


def test_hub_data_sets_name_their_extra(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OpenVisionError, match=r"openvision-encoders\[datasets\]"):
        read_hub_dataset("org/name", None, "train")


def test_hub_data_sets_are_read_by_their_library(monkeypatch) -> None:
    import sys
    import types

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [row("<image>\nWhat?", "It.", image=Image.new("RGB", (5, 5)))]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(read_hub_dataset("org/name", "sub", "train").samples) == 1
    assert asked == [("org/name", "sub", "train")]


def test_pad_to_square_loses_nothing_and_crop_loses_the_sides(assistant, data_folder) -> None:
    pixels = np.zeros((44, 88, 3), dtype=np.uint8)
    pixels[:, :10] = 255
    image = Image.fromarray(pixels)
    mean = torch.tensor(assistant.processor.image_processor.image_mean)
    std = torch.tensor(assistant.processor.image_processor.image_std)

    def shown(aspect):
        square = open_data(assistant, data_folder, aspect=aspect).pixels(image)[0]
        return square * std[:, None, None] + mean[:, None, None]

    padded, cropped = shown("pad"), shown("crop")
    assert padded.shape == cropped.shape == (3, 44, 44)
    assert padded[:, 22, 0].min() > 0.9
    # Above and below lies the mean colour.
    torch.testing.assert_close(padded[:, 2, 20], mean, atol=3e-3, rtol=0)
    assert cropped.max() < 0.1


def test_the_aspect_must_fit_the_model(assistant, next_assistant, data_folder) -> None:
    for wrong, aspect in ((assistant, "anyres"), (next_assistant, "pad")):
        with pytest.raises(OpenVisionError, match="does not fit the model"):
            open_data(wrong, data_folder, aspect=aspect)


# Batches.


def collator(assistant: Assistant, **settings) -> Collator:
    processor = assistant.processor
    return Collator(processor.tokenizer.pad_token_id, processor.image_token_id, assistant.geometry, **settings)


def summed_loss(assistant: Assistant, batch) -> float:
    with torch.no_grad():
        logits = assistant.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=IGNORED
    ).item()


@pytest.mark.parametrize("kind", ["llava-1.5", "llava-next"])
@pytest.mark.parametrize("packed", [False, True])
def test_batches_do_not_change_the_loss(assistant, next_assistant, data_folder, kind, packed) -> None:
    subject = assistant if kind == "llava-1.5" else next_assistant
    data = open_data(subject, data_folder, max_length=600)
    items = [data[index] for index in (0, 1, 2, 12)]
    alone = sum(summed_loss(subject, collator(subject)([item])) for item in items)
    batch = collator(subject, packed=packed)(items)
    assert batch["input_ids"].shape[0] == (1 if packed else 4)
    assert summed_loss(subject, batch) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", ["llava-1.5", "llava-next"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_blank_image_changes_no_loss_and_gives_the_projector_a_gradient(
    assistant, next_assistant, data_folder, kind, packed
) -> None:
    subject = assistant if kind == "llava-1.5" else next_assistant
    items = [open_data(subject, data_folder)[12]]
    plain = collator(subject, packed=packed)(items)
    blank = collator(subject, packed=packed, blank=True)(items)
    assert "pixel_values" not in plain
    assert summed_loss(subject, blank) == pytest.approx(summed_loss(subject, plain), rel=1e-5)
    subject.model(**blank).loss.backward()
    assert subject.model.model.multi_modal_projector.linear_1.weight.grad.abs().max() == 0
    subject.model.zero_grad()


def test_samples_of_a_pack_do_not_learn_each_others_first_token(assistant) -> None:
    items: list[Item] = [{"input_ids": [1, 2], "labels": [1, 2], "image_sizes": []} for _ in range(2)]
    batch = collator(assistant, packed=True)(items)
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, 2]]
    assert batch.get("position_ids", torch.empty(0)).tolist() == [[0, 1, 0, 1]]


# Order.


@pytest.mark.parametrize("lengths", [None, [7 * index % 11 for index in range(23)]])
def test_every_sample_once_an_epoch(lengths) -> None:
    order = list(SampleOrder(23, 4, 23, 5, lengths))
    assert len(order) == 92
    assert sorted(order) == sorted([*range(23)] * 4)
    assert order == list(SampleOrder(23, 4, 23, 5, lengths))
    assert order != list(SampleOrder(23, 4, 23, 6, lengths))


def test_like_lengths_share_a_batch() -> None:
    lengths = [index % 10 for index in range(400)]
    order = list(SampleOrder(400, 4, 100, 0, lengths))
    spread = [
        max(lengths[index] for index in order[at : at + 4]) - min(lengths[index] for index in order[at : at + 4])
        for at in range(0, 400, 4)
    ]
    assert np.mean(spread) < 0.5
    # Short and long batches are mixed.
    means = [np.mean([lengths[index] for index in order[at : at + 4]]) for at in range(0, 400, 4)]
    assert abs(np.corrcoef(means, np.arange(100))[0, 1]) < 0.4


def test_lengths_are_estimated_without_images(assistant, tmp_path) -> None:
    data = tiny.write_data(tmp_path / "data")
    dataset = open_data(assistant, data)
    for file in (data / "images").iterdir():
        file.unlink()
    lengths = dataset.lengths()
    assert lengths[12] < lengths[0]

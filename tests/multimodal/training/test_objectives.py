"""Objectives: answer logits give the model's own loss; the word loss, and what the projector learns from it."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.multimodal.data.batching import Collator
from openvision.multimodal.data.dataset import ConversationDataset, read_llava_json
from openvision.multimodal.model.generate import load_assistant
from openvision.multimodal.training.objectives import AnswerLoss, WordAlignment, count_words
from openvision.multimodal.training.run import train
from tests.multimodal.training.test_run import WORDS, losses, recipe

# Answers.


def batch_and_model(folder, data_folder, aspect, packed):
    assistant = load_assistant(folder, "cpu", "float32")
    records = read_llava_json([data_folder / "train.json"], data_folder / "images").samples
    dataset = ConversationDataset(records, assistant.processor, assistant.geometry, aspect, 4096)
    tokenizer = assistant.processor.tokenizer
    collator = Collator(tokenizer.pad_token_id, assistant.processor.image_token_id, assistant.geometry, packed=packed)
    return collator([dataset[index] for index in (0, 1, 2, 12)]), assistant.model.train()


def loss_and_gradients(model, batch, **more):
    model.zero_grad()
    loss = model(**batch, **more)["loss"]
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("count", [None, 50, torch.tensor(50)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("framework", ["llava-1.5", "llava-next"])
def test_answer_logits_give_the_same_gradients(model_folder, next_folder, data_folder, framework, packed, count):
    folder, aspect = (model_folder, "pad") if framework == "llava-1.5" else (next_folder, "anyres")
    batch, model = batch_and_model(folder, data_folder, aspect, packed)
    more = {} if count is None else {"num_items_in_batch": count}
    whole, expected = loss_and_gradients(model, batch, **more)
    computed = []
    model.lm_head.register_forward_hook(lambda *call: computed.append(len(call[-1])))
    loss, found = loss_and_gradients(AnswerLoss(model), batch, **more)
    torch.testing.assert_close(loss, whole)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    answers = (batch["labels"] != -100).sum()
    assert computed == [answers]
    assert answers < 0.5 * batch["labels"].numel()


def test_the_model_itself_is_unchanged(model_folder, data_folder):
    batch, model = batch_and_model(model_folder, data_folder, "pad", False)
    model.eval()
    question = {name: value for name, value in batch.items() if name != "labels"}
    with torch.inference_mode():
        before = model(**question).logits
        AnswerLoss(model)(**batch)
        torch.testing.assert_close(model(**question).logits, before)


def test_parameters_have_the_names_of_the_model(model_folder):
    """So checkpoints are the same with and without an objective."""
    model = load_assistant(model_folder, "cpu").model
    assert [name for name, _ in AnswerLoss(model).named_parameters()] == [name for name, _ in model.named_parameters()]
    assert AnswerLoss(model).state_dict().keys() == model.state_dict().keys()


# Words.

READ = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}


def open_data(folder, data_folder, aspect):
    assistant = load_assistant(folder, "cpu", "float32")
    records = read_llava_json([data_folder / "train.json"], data_folder / "images").samples
    return assistant, ConversationDataset(records, assistant.processor, assistant.geometry, aspect, 4096)


def make_batch(assistant, dataset, indices):
    tokenizer = assistant.processor.tokenizer
    collator = Collator(tokenizer.pad_token_id, assistant.processor.image_token_id, assistant.geometry, blank=True)
    return collator([dataset[index] for index in indices])


def vocabulary_of(assistant, dataset):
    return count_words(dataset.answers(), assistant.processor.tokenizer.all_special_ids)


def slow_loss(model, dataset, indices, vocabulary, special) -> torch.Tensor:
    """Sample by sample, as the module's text says it; images go through the tower one at a time."""
    embeddings = model.get_input_embeddings().weight.detach()
    words = [embeddings[token] for token in vocabulary.ids.tolist()]
    unit = torch.stack(words).square().mean().sqrt()
    total = torch.zeros(())
    for index in indices:
        item = dataset[index]
        if "pixel_values" not in item:
            continue
        pixels = item["pixel_values"][None] if dataset.geometry.pinpoints else item["pixel_values"]
        sizes = {"image_sizes": torch.tensor(item["image_sizes"])} if dataset.geometry.pinpoints else {}
        found = model.model.get_image_features(pixels, **READ, **sizes)
        tokens = torch.cat(list(found.pooler_output))
        closeness = torch.stack([tokens.mean(dim=0) @ word for word in words]) / (unit**2 * len(words[0]))
        logits = 10 * closeness + vocabulary.log_share
        said = {label for label in item["labels"] if label != -100} - set(special)
        logs = dict(zip(vocabulary.ids.tolist(), logits.log_softmax(dim=0), strict=True))
        total = total - sum(logs[word] for word in said) / len(said)
        total = total + 0.1 * torch.stack([(token.square().mean().sqrt() / unit - 1) ** 2 for token in tokens]).mean()
    return total / len(indices)


@pytest.mark.parametrize("indices", [(0, 1, 2, 12), (3,), (12,)])
@pytest.mark.parametrize("framework", ["llava-1.5", "llava-next"])
def test_the_word_loss_is_what_its_text_says(model_folder, next_folder, data_folder, framework, indices):
    folder, aspect = (model_folder, "pad") if framework == "llava-1.5" else (next_folder, "anyres")
    assistant, dataset = open_data(folder, data_folder, aspect)
    model, vocabulary = assistant.model, vocabulary_of(assistant, dataset)
    special = assistant.processor.tokenizer.all_special_ids
    projector = model.model.multi_modal_projector.linear_1.weight
    expected = slow_loss(model, dataset, indices, vocabulary, special)
    if expected.requires_grad:
        expected.backward()
    slope = projector.grad.clone() if projector.grad is not None else torch.zeros_like(projector)
    model.zero_grad()
    loss = WordAlignment(model, vocabulary)(**make_batch(assistant, dataset, indices))["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(projector.grad, slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))
    assert all(p.grad is None for p in model.model.language_model.parameters())


def test_words_are_counted_once_a_sample_and_marks_are_none():
    vocabulary = count_words([[5, 5, 7, 1], [7, 1], [1]], special=[1])
    assert vocabulary.ids.tolist() == [5, 7]
    assert vocabulary.log_share.tolist() == pytest.approx([math.log(1 / 3), math.log(2 / 3)])
    with pytest.raises(OpenVisionError, match="no answer has a word"):
        count_words([[1], []], special=[1])


COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def write_colours(folder: Path) -> Path:
    """Three shades of three colours, each called by its name."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for name, colour in COLOURS.items():
        for shade in (0, 20, 40):
            file = f"{name}-{shade}.png"
            Image.new("RGB", (44, 44), tuple(value + shade for value in colour)).save(folder / "images" / file)
            turns = [{"from": "human", "value": "<image>\nIt?"}, {"from": "gpt", "value": name}]
            rows.append({"id": file, "image": file, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def test_an_image_comes_to_say_its_own_words(model_folder, tmp_path):
    """Of the bytes of "red", "green" and "blue", those of its own name lie nearest, in a shade that was not trained."""
    stage = WORDS | {"samples": 900, "batch_size": 9, "micro_batch": 9}
    folder = train(recipe(stage), model_folder, write_colours(tmp_path / "data"), tmp_path / "run")
    seen = losses(tmp_path / "run")
    assert seen[-1] < 0.5 * seen[0]
    assistant = load_assistant(folder, "cpu", "float32")
    tokenizer, processor = assistant.processor.tokenizer, assistant.processor.image_processor
    embeddings = assistant.model.get_input_embeddings().weight.detach()
    for name, colour in COLOURS.items():
        image = Image.new("RGB", (44, 44), tuple(value + 10 for value in colour))
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        found = assistant.model.model.get_image_features(pixels, **READ)
        pooled = torch.cat(list(found.pooler_output)).mean(dim=0)
        said = {word: (embeddings[tokenizer(word)["input_ids"]] @ pooled).mean().item() for word in COLOURS}
        assert max(said, key=lambda word: said[word]) == name


def test_kinds_of_batches_train_alike(model_folder, data_folder, tmp_path):
    """Features cached, gradients added up, batches otherwise packed: the same losses."""
    kinds = {
        "plain": {"micro_batch": 4},
        "cached": {"micro_batch": 4, "cache_features": "always"},
        "added": {"micro_batch": 1},
        "packed": {"micro_batch": 4, "batching": "packed"},
    }
    for name, run in kinds.items():
        made = recipe(WORDS, **{"cache_features": "never", "batching": "random"} | run)
        train(made, model_folder, data_folder, tmp_path / name)
    for name in kinds:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-4), name

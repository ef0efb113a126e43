"""Logits of answers alone: the same loss and gradients as all logits, and inference untouched."""

import pytest
import torch

from openvision.multimodal.data.collate import Collator
from openvision.multimodal.data.dataset import ConversationDataset, read_llava_json
from openvision.multimodal.model.generate import load_assistant
from openvision.multimodal.training.answer_logits import answer_logits_only


def batch_and_model(folder, data_folder, aspect, packed):
    assistant = load_assistant(folder, "cpu", "float32")
    records = read_llava_json([data_folder / "train.json"], data_folder / "images").records
    dataset = ConversationDataset(records, assistant.processor, assistant.geometry, aspect, 4096)
    tokenizer = assistant.processor.tokenizer
    collator = Collator(tokenizer.pad_token_id, assistant.processor.image_token_id, assistant.geometry, packed=packed)
    return collator([dataset[index] for index in (0, 1, 2, 12)]), assistant.model.train()


def loss_and_gradients(model, batch, **more):
    model.zero_grad()
    output = model(**batch, **more)
    output.loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, named


@pytest.mark.parametrize("count", [None, 50, torch.tensor(50)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("framework", ["llava-1.5", "llava-next"])
def test_same_loss_and_gradients(model_folder, next_folder, data_folder, framework, packed, count):
    folder, aspect = (model_folder, "pad") if framework == "llava-1.5" else (next_folder, "anyres")
    batch, model = batch_and_model(folder, data_folder, aspect, packed)
    more = {} if count is None else {"num_items_in_batch": count}
    whole, expected = loss_and_gradients(model, batch, **more)
    answer_logits_only(model)
    part, found = loss_and_gradients(model, batch, **more)
    torch.testing.assert_close(part.loss, whole.loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    answers = (batch["labels"] != -100).sum()
    assert part.logits.shape[0] == answers
    assert answers < 0.5 * batch["labels"].numel()


def test_without_labels_nothing_changes(model_folder, data_folder):
    batch, model = batch_and_model(model_folder, data_folder, "pad", False)
    model.eval()
    question = {name: value for name, value in batch.items() if name != "labels"}
    with torch.inference_mode():
        before = model(**question).logits
        answer_logits_only(model)
        model(**batch)
        torch.testing.assert_close(model(**question).logits, before)

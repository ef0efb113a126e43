"""Operations of a stage, by hand and by torch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.multimodal.cost import sample_cost
from openvision.multimodal.data.batching import Collator
from openvision.multimodal.data.conversation import parse_conversation, tokenize
from openvision.multimodal.data.dataset import Item
from openvision.multimodal.model.generate import load_assistant
from openvision.multimodal.model.geometry import Geometry
from openvision.multimodal.recipe import LearningRates, VlmStage
from openvision.multimodal.training.modules import choose_trained
from openvision.multimodal.training.objectives import AnswerLoss
from openvision.weights.registry import released
from tests.multimodal import tiny


def stage(**rates: float) -> VlmStage:
    return VlmStage(name="s", conversations="a.json", batch_size=1, learning_rate=LearningRates(**rates))


@pytest.mark.parametrize(
    "rates", [{"projector": 1.0}, {"projector": 1.0, "llm": 1.0}, {"projector": 1.0, "encoder": 1.0}]
)
def test_operations_are_those_torch_counts(model_folder, rates) -> None:
    assistant = load_assistant(model_folder, "cpu")
    model, geometry = assistant.model, assistant.geometry
    choose_trained(model, LearningRates(**rates), None)
    objective = AnswerLoss(model)
    turns = [{"from": "human", "value": "<image>\n" + "What is it? " * 25}, {"from": "gpt", "value": "A cat."}]
    sample = parse_conversation({"conversations": turns}, "x", 1)
    tokenizer, image_token = assistant.processor.tokenizer, assistant.processor.image_token_id
    tokenized = tokenize(sample, tokenizer, image_token, [[image_token] * geometry.patches], 999)
    item: Item = {
        "input_ids": tokenized.input_ids,
        "labels": tokenized.labels,
        "image_sizes": [(44, 44)],
        "pixel_values": torch.zeros(1, 3, 44, 44),
    }
    batch = Collator(tokenizer.pad_token_id, image_token, geometry)([item])
    with FlopCounterMode(display=False) as counter:
        objective(**batch)["loss"].backward()
    text = len(tokenized.input_ids) - geometry.patches
    multiplied = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
    cost = sample_cost(stage(**rates), tiny.VISION, geometry, multiplied, text)
    # Attention scores and the projector are left out, and are much of so small a model.
    assert 0.5 * counter.get_total_flops() < cost.total < 1.05 * counter.get_total_flops()


def test_by_hand() -> None:
    """L/14 at 336 px beside 7.5 billion parameters, whole model trained: 6 operations a parameter and token."""
    vision = released("openvision-vit-large-patch14-336").vision
    geometry = Geometry(336, 14, 1, 1024, 24)
    cost = sample_cost(stage(projector=1.0, llm=1.0), vision, geometry, 7.5e9, 200)
    assert cost.llm == 6 * 7.5e9 * 776
    # 303 million parameters on 577 tokens, and attention: about 0.38 TFLOP.
    assert cost.encoder == pytest.approx(2 * 303e6 * 577 + 4 * 577**2 * 1024 * 24, rel=0.01)
    assert cost.cached_speedup == pytest.approx(1.011, abs=2e-3)


def test_words_are_learnt_without_the_language_model() -> None:
    vision = released("openvision-vit-small-patch16-224").vision
    geometry = Geometry(224, 16, 1, 384, 12)
    words = stage(projector=1.0).model_copy(update={"objective": "words"})
    cost = sample_cost(words, vision, geometry, 1e9, 20)
    assert cost.total == cost.encoder == sample_cost(stage(projector=1.0), vision, geometry, 1e9, 20).encoder
    done = run(
        "recipes/vlm/demo.toml",
        "--encoder",
        "openvision-vit-small-patch16-224",
        "--llm-parameters",
        "1e8",
        "--samples",
        5,
        "--samples",
        5,
    )
    assert done.exit_code == 0, done.output
    assert "words: cached features leave only the projector" in done.output
    assert "instruct: cached features make a step" in done.output


def run(*arguments: object):
    return CliRunner().invoke(app, ["vlm", "plan", *map(str, arguments)])


def test_the_command() -> None:
    common = ("--encoder", "openvision-vit-large-patch14-336", "--llm-parameters", "7.5e9")
    done = run("recipes/vlm/open-llava-next.toml", *common, "--samples", 558128, "--samples", 1000000)
    assert done.exit_code == 0, done.output
    assert "align: 558,128 samples of 2928 + 200 tokens" in done.output
    # The encoder of the second stage is trained: nothing to cache.
    assert done.output.count("cached features") == 1
    wrong = run("recipes/vlm/open-llava-next.toml", *common, "--samples", 5)
    assert "give --samples once for each stage" in str(wrong.exception)

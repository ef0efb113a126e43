"""Trimmed texts give the losses and gradients of texts computed to the last padding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from openvision.data.batch import Batch, from_arrays, to_arrays
from openvision.errors import OpenVisionError
from openvision.models.openvision2 import build_model
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.training.objective import build_objective
from openvision.training.setup.parallel import DistributedModel
from openvision.training.step import forward_backward
from tests.training.small_step import SAMPLES, batch_of, randomness_of, recipe_of

CONTEXT = 24
LENGTHS = torch.tensor([[3, 9], [4, 20], [3, 23], [7, 5], [10, 5], [4, 6], [22, 4], [5, 12]])


def masking(kind: str, pool: str, reads_padding: bool = True) -> Recipe:
    table = recipe_of(kind).model_dump(exclude_none=True)
    table["model"]["text"] |= {"pad_id": 0, "pool": pool, "context_length": CONTEXT}
    if not reads_padding:
        table["model"]["decoder"]["reads_padding"] = False
    return parse_recipe(table, kind)


def padded_batch(lengths: Tensor = LENGTHS) -> Batch:
    """A batch with ids below `lengths` and padding above, the class token last."""
    generator = torch.Generator().manual_seed(1)
    ids = []
    for length in lengths.unbind(1):
        own = torch.randint(5, 40, (SAMPLES, CONTEXT), generator=generator)
        own[:, :-1].masked_fill_(torch.arange(CONTEXT - 1) >= length[:, None], 0)
        ids.append(own)
    return replace(batch_of(), alt_ids=ids[0], sentence_ids=ids[1])


def run(model: nn.Module, recipe: Recipe, batch: Batch, micro_batches: int) -> tuple[dict, dict]:
    model.zero_grad()
    distributed = DistributedModel(model)  # pyright: ignore[reportArgumentType]
    objective = build_objective(distributed, recipe.loss, bos_id=1)
    losses = forward_backward(distributed, objective, batch, randomness_of(), micro_batches=micro_batches)
    return losses.terms, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize(
    ("kind", "reads_padding"),
    [("openvision", True), ("openvision", False), ("clip", True), ("sigmoid", True), ("openvision3", True)],
)
def test_losses_and_gradients_are_those_of_whole_texts(kind, reads_padding, pool, micro_batches):
    recipe, batch = masking(kind, pool, reads_padding), padded_batch()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        torch.manual_seed(0)
        model = build_model(recipe.model).to(dtype).train()
        terms, gradients = run(model, recipe, batch, 1)
        trimmed_terms, trimmed = run(model, recipe, replace(batch, text_lengths=LENGTHS), micro_batches)
        assert terms.keys() == trimmed_terms.keys()
        for name, value in terms.items():
            torch.testing.assert_close(trimmed_terms[name], value, rtol=tolerance, atol=tolerance, msg=name)
        assert gradients.keys() == trimmed.keys()
        for name, gradient in gradients.items():
            bound = tolerance * max(1.0, gradient.abs().max().item()) * 4
            assert (trimmed[name] - gradient).abs().max() <= bound, (name, dtype)


def test_padding_beyond_the_longest_of_a_group_is_not_computed():
    recipe, read = masking("clip", "mean"), []
    model = build_model(recipe.model).train()
    assert model.text is not None
    model.text.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape[:2])))
    run(model, recipe, replace(padded_batch(), text_lengths=LENGTHS), 1)
    # Alt-texts of 3, 3, 4, 4 and 5, 7, 10, 22 ids, each with its class token.
    assert read == [(4, 5), (4, 23)]


def test_a_decoder_that_leaves_padding_out_is_not_moved_by_it():
    recipe, batch = masking("openvision", "class", reads_padding=False), padded_batch()
    model = build_model(recipe.model).train()
    before, _ = run(model, recipe, batch, 1)
    assert model.text is not None
    with torch.no_grad():
        model.text.token_embed.weight[0] += 1
        model.text.pos_embed[:, 22] += 1
    after, _ = run(model, recipe, batch, 1)
    # Only the one sentence of 23 ids is read at position 22.
    assert after["caption"] == before["caption"]
    reading = build_model(masking("openvision", "class").model).train()
    reading.load_state_dict(model.state_dict())
    assert run(reading, recipe, batch, 1)[0]["caption"] != after["caption"]
    assert recipe.model.to_dict()["decoder"]["reads_padding"] is False
    assert "reads_padding" not in masking("openvision", "class").model.to_dict()["decoder"]


def test_lengths_travel_with_a_batch_from_a_worker():
    batch = replace(padded_batch(), text_lengths=LENGTHS)
    found = from_arrays(to_arrays(batch)).text_lengths
    assert found is not None
    assert torch.equal(found, LENGTHS)
    assert from_arrays(to_arrays(padded_batch())).text_lengths is None


def test_padding_that_is_read_cannot_be_left_out():
    table = recipe_of("openvision").model_dump(exclude_none=True)
    table["run"]["trim_texts"] = True
    with pytest.raises(OpenVisionError, match=r"run.trim_texts leaves padding out, .* set model.text.pad_id"):
        parse_recipe(table, "recipe.toml")
    table["run"]["trim_texts"] = False
    table["model"]["decoder"]["reads_padding"] = False
    with pytest.raises(OpenVisionError, match=r"decoder.reads_padding false needs text.pad_id"):
        parse_recipe(table, "recipe.toml")
    # Captions are trimmed whatever a text tower reads.
    table = recipe_of("openvision2").model_dump(exclude_none=True)
    table["run"]["trim_texts"] = True
    assert parse_recipe(table, "recipe.toml").run.trim_texts

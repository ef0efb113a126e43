"""A batch in chunks gives the losses and gradients of the batch at once, whatever is random in it."""

import copy

import pytest
import torch

from openvision.models.openvision2 import build_model
from openvision.training.objective import build_objective
from openvision.training.randomness import Draws
from tests.training.small_step import SAMPLES, batch_of, draws_of, recipe_of, run


@pytest.mark.parametrize("kind", ["openvision", "clip", "openvision2"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_chunks_equal_the_batch_in_float64(kind, parts):
    recipe = recipe_of(kind)
    model = build_model(recipe.model).double().train()
    terms, gradients = run(model, recipe, 1, draws_of(drop_path=0.6))
    chunked_terms, chunked_gradients = run(model, recipe, parts, draws_of(drop_path=0.6))
    assert terms.keys() == chunked_terms.keys()
    for name, value in terms.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(chunked_terms[name], value, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == chunked_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_chunks_equal_the_batch_in_float32():
    recipe = recipe_of("openvision")
    model = build_model(recipe.model).train()
    terms, gradients = run(model, recipe, 1, draws_of())
    chunked_terms, chunked_gradients = run(model, recipe, 4, draws_of())
    assert abs(terms["loss"] - chunked_terms["loss"]) < 1e-5
    for name, gradient in gradients.items():
        assert (gradient - chunked_gradients[name]).abs().max() < 1e-5 + 1e-4 * gradient.abs().max(), name


def test_every_parameter_learns_under_autocast_in_chunks():
    """Autocast keeps the weights it casts: those cast without a gradient must not serve the second pass."""
    recipe = recipe_of("openvision")
    model = build_model(recipe.model).train()
    terms, gradients = run(model, recipe, 1, draws_of(), torch.bfloat16)
    chunked_terms, chunked_gradients = run(model, recipe, 4, draws_of(), torch.bfloat16)
    assert gradients.keys() == chunked_gradients.keys() == dict(model.named_parameters()).keys()
    assert abs(terms["loss"] - chunked_terms["loss"]) < 0.02
    for name, gradient in gradients.items():
        assert gradient.dtype == chunked_gradients[name].dtype == torch.float32
        assert (gradient - chunked_gradients[name]).norm() < 0.1 * gradient.norm() + 1e-4, name


def test_the_plain_mean_over_chunks_is_another_loss():
    """What naive accumulation would do: fewer negatives, and captions weighed by chunk."""
    recipe = recipe_of("openvision")
    model = build_model(recipe.model).train()
    objective, batch = build_objective(recipe, 1), batch_of()
    embeds, _terms = objective.forward(model, batch, draws_of(), batch.label_mask.sum())
    whole = objective.coupled(model, embeds)["contrastive"]
    halves = [objective.coupled(model, tuple(e.narrow(-2, s, 4) for e in embeds))["contrastive"] for s in (0, 4)]
    assert abs(sum(halves) / 2 - whole) > 0.1


def test_stochastic_depth_is_a_function_of_seed_and_position():
    scales = draws_of(0.5).branch_scales(3)
    assert scales is not None
    assert scales.shape == (3, 2, SAMPLES)
    assert (scales[0] == 1).all()
    assert set(scales[2].flatten().tolist()) <= {0.0, 2.0}
    part, other = draws_of(0.5).part(slice(2, 5)).branch_scales(3), Draws(4, draws_of().positions, 0.5).branch_scales(3)
    assert part is not None
    assert other is not None
    assert torch.equal(part, scales[..., 2:5])
    assert not torch.equal(other, scales)
    assert draws_of(0.0).branch_scales(3) is None


def test_dropped_branches_are_left_out_and_only_in_the_step():
    recipe = recipe_of("clip")
    model = build_model(recipe.model).train()
    plain, _ = run(model, recipe, 1, draws_of(0.0))
    dropped, gradients = run(model, recipe, 1, draws_of(0.9999))
    assert plain["loss"] != dropped["loss"]
    assert gradients["vision.blocks.2.mlp.fc1.weight"].norm() == 0
    assert all(block.branch_scale is None for block in model.vision.blocks)
    again, _ = run(copy.deepcopy(model), recipe, 1, draws_of(0.0))
    assert plain["loss"] == again["loss"]

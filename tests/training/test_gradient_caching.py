"""A batch in micro-batches gives the losses and gradients of the batch at once, whatever is random in it."""

import copy

import pytest
import torch

from openvision.models.openvision2 import build_model
from openvision.training.objective import build_objective
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.parallel import DistributedModel
from tests.training.small_step import SAMPLES, batch_of, randomness_of, recipe_of, run


@pytest.mark.parametrize("kind", ["openvision", "clip", "openvision2", "openvision3", "genlip", "sigmoid", "joint"])
@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_equal_the_batch_in_float64(kind, micro_batches):
    recipe = recipe_of(kind)
    model = build_model(recipe.model).double().train()
    terms, gradients = run(model, recipe, 1, randomness_of(drop_path=0.6))
    cached_terms, cached_gradients = run(model, recipe, micro_batches, randomness_of(drop_path=0.6))
    assert terms.keys() == cached_terms.keys()
    for name, value in terms.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(cached_terms[name], value, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == cached_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_micro_batches_equal_the_batch_in_float32():
    recipe = recipe_of("openvision")
    model = build_model(recipe.model).train()
    terms, gradients = run(model, recipe, 1, randomness_of())
    cached_terms, cached_gradients = run(model, recipe, 4, randomness_of())
    assert abs(terms["loss"] - cached_terms["loss"]) < 1e-5
    for name, gradient in gradients.items():
        assert (gradient - cached_gradients[name]).abs().max() < 1e-5 + 1e-4 * gradient.abs().max(), name


def test_every_parameter_learns_under_autocast_in_micro_batches():
    """Autocast keeps the weights it casts: those cast without a gradient must not serve the second pass."""
    recipe = recipe_of("openvision")
    model = build_model(recipe.model).train()
    terms, gradients = run(model, recipe, 1, randomness_of(), torch.bfloat16)
    cached_terms, cached_gradients = run(model, recipe, 4, randomness_of(), torch.bfloat16)
    assert gradients.keys() == cached_gradients.keys() == dict(model.named_parameters()).keys()
    assert abs(terms["loss"] - cached_terms["loss"]) < 0.02
    for name, gradient in gradients.items():
        assert gradient.dtype == cached_gradients[name].dtype == torch.float32
        assert (gradient - cached_gradients[name]).norm() < 0.1 * gradient.norm() + 1e-4, name


def test_the_plain_mean_over_micro_batches_is_another_loss():
    """What naive accumulation would do: fewer negatives, and captions weighed by micro-batch."""
    recipe = recipe_of("openvision")
    model = build_model(recipe.model).train()
    objective, batch = build_objective(DistributedModel(model), recipe.loss, 1), batch_of()
    embeds, _terms = objective.forward(batch, randomness_of(), batch.label_mask.sum())
    whole = objective.coupled(embeds, batch)["contrastive"]
    halves = [objective.coupled(tuple(e.narrow(-2, s, 4) for e in embeds), batch)["contrastive"] for s in (0, 4)]
    assert abs(sum(halves) / 2 - whole) > 0.1


def test_stochastic_depth_is_a_function_of_seed_and_position():
    scales = randomness_of(0.5).branch_scales(3)
    assert scales is not None
    assert scales.shape == (3, 2, SAMPLES)
    assert (scales[0] == 1).all()
    assert set(scales[2].flatten().tolist()) <= {0.0, 2.0}
    part, other = (
        randomness_of(0.5).rows(slice(2, 5)).branch_scales(3),
        SampleRandomness(4, randomness_of().positions, 0.5).branch_scales(3),
    )
    assert part is not None
    assert other is not None
    assert torch.equal(part, scales[..., 2:5])
    assert not torch.equal(other, scales)
    assert randomness_of(0.0).branch_scales(3) is None


def test_dropped_branches_are_left_out_and_only_in_the_step():
    recipe = recipe_of("clip")
    model = build_model(recipe.model).train()
    plain, _ = run(model, recipe, 1, randomness_of(0.0))
    dropped, gradients = run(model, recipe, 1, randomness_of(0.9999))
    assert plain["loss"] != dropped["loss"]
    assert gradients["vision.blocks.2.mlp.fc1.weight"].norm() == 0
    assert all(block.branch_scale is None for block in model.vision.blocks)
    again, _ = run(copy.deepcopy(model), recipe, 1, randomness_of(0.0))
    assert plain["loss"] == again["loss"]

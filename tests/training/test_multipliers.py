"""A learning rate for each tower: factors on that of the step, in groups of their own."""

import copy

import pytest
import torch

from openvision.errors import OpenVisionError
from openvision.models.openvision2 import AnyModel, build_model
from openvision.recipe.schema import parse_recipe
from openvision.recipe.sections import Multipliers, Optimizer
from openvision.training.optimizer.build import build_optimizer
from openvision.training.optimizer.update import apply_update, gradient_norm
from tests.training.small_step import randomness_of, recipe_of, run

FACTORS = Multipliers(vision=0.1, text=0, decoder=2.0)


def updated(model: AnyModel, optimizer: Optimizer, rate: float) -> dict[str, torch.Tensor]:
    """Parameters after two updates with the same gradients."""
    changed = copy.deepcopy(model)
    for parameter, source in zip(changed.parameters(), model.parameters(), strict=True):
        parameter.grad = None if source.grad is None else source.grad.clone()
    made = build_optimizer(changed, optimizer)
    for _ in range(2):
        apply_update(made, rate, gradient_norm(made))
    return dict(changed.named_parameters())


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_each_tower_is_updated_as_at_its_own_rate(kind):
    recipe = recipe_of("openvision")
    model = build_model(recipe.model)
    run(model, recipe, 1, randomness_of())
    plain = Optimizer(kind=kind)
    ours = updated(model, plain.model_copy(update={"multipliers": FACTORS}), 1e-2)
    for tower, factor in {"vision": 0.1, "text": 0.0, "decoder": 2.0, "logit_scale": 1.0}.items():
        wanted = updated(model, plain, 1e-2 * factor)
        own = [name for name in ours if name.startswith(tower)]
        assert own
        for name in own:
            torch.testing.assert_close(ours[name], wanted[name], rtol=0, atol=1e-7, msg=name)
    assert all(torch.equal(ours[name], p) for name, p in model.named_parameters() if name.startswith("text."))


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_without_factors_there_are_the_groups_of_before(kind):
    model = build_model(recipe_of("openvision").model)
    groups = build_optimizer(model, Optimizer(kind=kind)).param_groups
    assert len(groups) == {"adam": 2, "muon": 4}[kind]
    assert not any("multiplier" in group for group in groups)


def test_every_parameter_is_in_one_group():
    model = build_model(recipe_of("openvision").model)
    groups = build_optimizer(model, Optimizer(kind="muon", multipliers=FACTORS)).param_groups
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))


def test_a_tower_that_is_not_there_and_a_factor_that_is_none():
    content = recipe_of("clip").model_dump()
    with pytest.raises(
        OpenVisionError, match=r"optimizer.multipliers.decoder: the model has no decoder; leave the key"
    ):
        parse_recipe(content | {"optimizer": {"multipliers": {"decoder": 0.5}}}, "clip")
    with pytest.raises(OpenVisionError, match=r"optimizer\.multipliers\.vision"):
        parse_recipe(content | {"optimizer": {"multipliers": {"vision": -1}}}, "clip")
    with pytest.raises(OpenVisionError, match=r"did you mean vision"):
        parse_recipe(content | {"optimizer": {"multipliers": {"vison": 1}}}, "clip")

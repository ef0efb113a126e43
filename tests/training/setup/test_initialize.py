"""Initial parameters are those of a model built in one piece, and a forgotten one is noticed."""

import copy

import pytest
import torch
from torch import nn

from openvision.errors import OpenVisionError
from openvision.models.openvision2 import build_model
from openvision.training.setup.initialize import initialise, materialise


def built_in_parts(config, seed: int):
    with torch.device("meta"):
        model = build_model(config)
    materialise(model, torch.device("cpu"))
    assert all(parameter.isnan().all() for parameter in model.parameters())
    initialise(model, seed)
    return model


@pytest.mark.parametrize("seed", [0, 7])
def test_initial_parameters_are_those_of_a_model_built_in_one_piece(tiny_recipe, seed):
    torch.manual_seed(seed)
    expected = build_model(tiny_recipe.model).state_dict()
    found = built_in_parts(tiny_recipe.model, seed).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_parameters_are_the_modules_own_again(tiny_recipe):
    model = built_in_parts(tiny_recipe.model, 0)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_forgotten_parameter_is_named(tiny_recipe, monkeypatch):
    from openvision.models.vision import VisionTransformer

    init = VisionTransformer.init_weights

    def forgetful(self):
        kept = self.cls_token
        self._parameters["cls_token"] = copy.copy(torch.zeros(1, 1, 32))
        init(self)
        self._parameters["cls_token"] = kept

    monkeypatch.setattr(VisionTransformer, "init_weights", forgetful)
    with pytest.raises(OpenVisionError, match=r"no initialiser of OpenVision writes vision.cls_token"):
        built_in_parts(tiny_recipe.model, 0)

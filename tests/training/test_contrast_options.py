"""Options of the contrastive loss in a run: learned numbers, resume, warm start, stored files, bad input."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from openvision.errors import OpenVisionError
from openvision.files import read_json_lines
from openvision.inference.load import load
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import build_model
from openvision.models.openvision3 import OpenVision3Config
from openvision.recipe.schema import Recipe, dump_recipe, load_recipe, parse_recipe
from openvision.text.tokenizer import Tokenizer
from openvision.training.setup.start import start_from
from openvision.training.trainer import Interrupted, Trainer
from openvision.weights.folder import save_folder
from openvision.weights.open_clip import config_to_open_clip, from_open_clip, to_open_clip
from tests.conftest import TINY_RECIPE
from tests.training.small_step import randomness_of, recipe_of, run

SIGMOID = {"kind": "sigmoid", "logit_scales": "per_text"}


def tiny(loss: dict) -> Recipe:
    changed = copy.deepcopy(TINY_RECIPE)
    changed["loss"] = changed.get("loss", {}) | loss
    changed["stages"][0]["micro_batches"] = 2
    return parse_recipe(changed, "tiny")


def test_the_loss_says_which_numbers_the_model_has_and_where_they_begin():
    plain, sigmoid = (OpenVision(recipe_of(kind).model) for kind in ("clip", "sigmoid"))  # pyright: ignore[reportArgumentType]
    added = sigmoid.state_dict().keys() - plain.state_dict().keys()
    assert added == {"logit_bias", "logit_scale_sentence"}
    assert not plain.state_dict().keys() - sigmoid.state_dict().keys()
    assert [sigmoid.logit_scale.item(), sigmoid.log_scale("sentence").item()] == pytest.approx([math.log(10)] * 2)
    assert sigmoid.logit_bias is not None
    assert sigmoid.logit_bias.item() == -10
    assert plain.log_scale("sentence") is plain.logit_scale
    assert "logit_bias" not in plain.config.to_dict()
    for kind in ("sigmoid", "joint", "openvision3"):
        config = recipe_of(kind).model
        assert isinstance(config, OpenVisionConfig | OpenVision3Config)
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_both_logit_scales_and_the_bias_learn_each_of_its_own_text():
    recipe = recipe_of("sigmoid")
    _, gradients = run(build_model(recipe.model), recipe, 1, randomness_of())
    numbers = [gradients[name] for name in ("logit_scale", "logit_scale_sentence", "logit_bias")]
    assert all(number != 0 for number in numbers)
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize(
    "loss",
    [pytest.param(SIGMOID, id="sigmoid"), pytest.param({"captions": "joint"}, id="joint", marks=pytest.mark.slow)],
)
def test_a_run_learns_resumes_exactly_and_is_read_back(loss, shapes_folder, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Trainer(tiny(loss), shapes_folder, whole).run()
    first = Trainer(tiny(loss), shapes_folder, stopped)
    first.stop.wanted = True
    with pytest.raises(Interrupted):
        first.run()
    Trainer(tiny(loss), shapes_folder, stopped).run()
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, stopped))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    train = [line for line in read_json_lines(whole / "metrics.jsonl") if line["kind"] == "train"]
    assert train[-1]["contrastive"] < train[0]["contrastive"]
    assert load_recipe(whole / "recipe.toml") == tiny(loss)
    encoder = load(whole)
    if loss is SIGMOID:
        assert {"logit_scale", "logit_scale_sentence", "logit_bias"} <= train[0].keys()
        assert encoder.bias == pytest.approx(a["logit_bias"].item())
    else:
        assert train[-1]["contrastive_joint"] == train[-1]["contrastive"]
        assert encoder.bias is None


def test_a_warm_start_takes_the_numbers_that_mean_the_same(tmp_path):
    shared, own = recipe_of("openvision").model, recipe_of("joint").model
    source = build_model(shared)
    assert isinstance(source, OpenVision)
    source.logit_scale.data.fill_(3.0)
    save_folder(tmp_path / "softmax", source, Tokenizer.train(["a red ball"], 30), "", {})
    ours = build_model(own)
    assert isinstance(ours, OpenVision)
    assert start_from(ours, str(tmp_path / "softmax"))[-2:] == ["logit_scale", "logit_scale_sentence"]
    assert ours.log_scale("sentence").item() == 3.0
    sigmoid = build_model(recipe_of("sigmoid").model)
    assert isinstance(sigmoid, OpenVision)
    assert start_from(sigmoid, str(tmp_path / "softmax")) == ["vision", "text"]
    assert sigmoid.logit_scale.item() == pytest.approx(math.log(10)), "a scale of the softmax means nothing here"


def test_the_bias_goes_through_open_clips_layout():
    config = recipe_of("sigmoid").model
    assert isinstance(config, OpenVisionConfig)
    theirs = to_open_clip(OpenVision(config).state_dict(), config)
    assert theirs["logit_bias"].item() == -10
    assert "logit_scale_sentence" not in theirs
    assert from_open_clip(theirs, "here")["logit_bias"].item() == -10
    assert config_to_open_clip(config)["model_cfg"]["init_logit_bias"] == -10


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"kind": "sigmod"}, "loss.kind"),
        ({"kind": "sigmoid", "captions": "joint"}, 'captions "joint" is a form of the softmax'),
        ({"texts": ["alt"], "captions": "joint"}, r'captions "joint" needs texts = \["alt", "sentence"\]'),
        (
            {"texts": ["alt"], "logit_scales": "per_text"},
            r'logit_scales "per_text" needs texts = \["alt", "sentence"\]',
        ),
        ({"captions": "joint", "equal_texts": "positives"}, "equal texts are one vector"),
    ],
)
def test_forms_that_do_not_go_together(loss, message):
    with pytest.raises(OpenVisionError, match=message):
        tiny(loss)


def test_a_number_that_the_loss_does_not_ask_for_is_refused():
    changed = copy.deepcopy(TINY_RECIPE)
    changed["model"]["logit_bias"] = True
    with pytest.raises(OpenVisionError, match=r"model.logit_bias follows from \[loss\], which does not ask for it"):
        parse_recipe(changed, "tiny")
    with pytest.raises(OpenVisionError, match="a model of kind openvision2 contrasts nothing"):
        parse_recipe(
            recipe_of("openvision2").model_dump() | {"loss": {"contrastive": 0, "texts": [], "kind": "sigmoid"}}, "v2"
        )


def test_another_loss_may_be_set_over_a_stored_recipe(tmp_path):
    (tmp_path / "stored.toml").write_text(dump_recipe(tiny({})))
    recipe = load_recipe(tmp_path / "stored.toml", ["loss.kind=sigmoid"])
    assert isinstance(recipe.model, OpenVisionConfig)
    assert recipe.model.logit_bias

"""Every released name, its shape and its numbers."""

import csv
from pathlib import Path

import pytest
import torch

from openvision.errors import OpenVisionError
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.vision import VisionTransformer
from openvision.weights.open_clip import from_open_clip
from openvision.weights.registry import available_models, released, released_in
from openvision.weights.strict import assign_strictly
from tests.released import released_shapes, vision_shapes

GOLDEN = Path(__file__).parents[1] / "golden"
COUNTS = {row["model"]: row for row in csv.DictReader((GOLDEN / "parameter_counts.tsv").open(), delimiter="\t")}
V1 = [name for name in available_models() if name.startswith("openvision-")]
V2 = [name for name in available_models() if name.startswith("openvision2-")]


def test_names() -> None:
    assert set(V1) == COUNTS.keys()
    assert V2 == [
        "openvision2-vit-large-patch14-224",
        "openvision2-vit-large-patch14-336",
        "openvision2-vit-so400m-patch14-384",
        "openvision2-vit-huge-patch14-224",
        "openvision2-vit-huge-patch14-336",
        "openvision2-vit-huge-patch14-448",
        "openvision2-vit-giant-patch14-224",
    ]


@pytest.mark.parametrize("name", V1)
def test_parameters_are_the_originals(name) -> None:
    entry, golden = released(name), COUNTS[name]
    assert entry.parameters == int(golden["vision_without_positions"])
    assert entry.parameters + (entry.tokens + 1) * entry.vision.width == int(golden["vision_with_positions_and_head"])
    assert entry.imagenet_top1 is not None


def test_paper_counts_of_openvision2() -> None:
    millions = {name: round(released(name).parameters / 1e6, 2) for name in V2}
    assert millions["openvision2-vit-large-patch14-224"] == 302.91
    assert millions["openvision2-vit-so400m-patch14-384"] == 412.15
    assert millions["openvision2-vit-huge-patch14-448"] == 630.43
    assert millions["openvision2-vit-giant-patch14-224"] == 1010.84


def test_token_counts() -> None:
    assert released("openvision-vit-so400m-patch14-384").tokens == 27 * 27
    assert released("openvision-vit-large-patch14-84").tokens == 36
    assert released("openvision-vit-tiny-patch8-384").tokens == 2304


def test_the_rule_gives_the_released_file_of_the_smallest_model() -> None:
    rows = [line.split("\t") for line in (GOLDEN / "released_state_dict_ti16_160.tsv").read_text().splitlines()]
    golden = {name: tuple(int(n) for n in shape.strip("()").split(",") if n) for name, shape, *_ in rows}
    config = released("openvision-vit-tiny-patch16-160").full
    assert config is not None
    assert released_shapes(config) == golden


@pytest.mark.parametrize("name", V1)
def test_names_and_shapes_of_every_released_file_fit(name) -> None:
    config = released(name).full
    assert config is not None
    config = OpenVisionConfig(config.embed_dim, config.vision, config.text)
    state = {key: torch.empty(shape, device="meta") for key, shape in released_shapes(config).items()}
    with torch.device("meta"):
        model = OpenVision(config)
    assign_strictly(model, from_open_clip(state, name), name)


@pytest.mark.parametrize("name", V2)
def test_names_and_shapes_of_the_vision_only_files_fit(name) -> None:
    vision = released(name).vision
    state = {key: torch.empty(shape, device="meta") for key, shape in vision_shapes(vision, vision.width).items()}
    with torch.device("meta"):
        tower = VisionTransformer(vision, vision.width)
    converted = {key.removeprefix("vision."): tensor for key, tensor in from_open_clip(state, name).items()}
    assign_strictly(tower, converted, name)


def test_a_wrong_name_suggests_the_nearest() -> None:
    with pytest.raises(OpenVisionError, match="did you mean 'openvision-vit-large-patch14-224'"):
        released("openvision-vit-larg-patch14-224")


def test_a_hub_id_is_recognised() -> None:
    entry = released_in("UCSC-VLAA/openvision2-vit-large-patch14-224-vision-only")
    assert entry is released("openvision2-vit-large-patch14-224")
    assert released_in("somebody/else") is None

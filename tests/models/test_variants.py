"""Every released size has exactly the parameters of the original."""

import csv

import pytest
import torch

from openvision.models.openvision import OpenVision
from openvision.models.variants import released_variants, variant


def count(module: torch.nn.Module | None) -> int:
    assert module is not None
    return sum(parameter.numel() for parameter in module.parameters())


def rows(golden_folder) -> dict[str, dict[str, int]]:
    with open(golden_folder / "parameter_counts.tsv") as file:
        return {
            row.pop("model"): {key: int(value) for key, value in row.items()}
            for row in csv.DictReader(file, delimiter="\t")
        }


def test_all_released_names_are_known(golden_folder):
    assert released_variants().keys() == rows(golden_folder).keys()
    assert len(released_variants()) == 26


@pytest.mark.parametrize("name", released_variants())
def test_parameter_counts(name, golden_folder):
    expected = rows(golden_folder)[name]
    config = released_variants()[name]
    with torch.device("meta"):
        model = OpenVision(config)
    grid_rows, grid_columns = config.vision.grid()
    positions = (grid_rows * grid_columns + 1) * config.vision.width
    vision, head = count(model.vision), count(model.vision.head)
    assert vision == expected["vision_without_positions"]
    assert vision - head == expected["vision_without_positions_and_head"]
    assert vision + positions == expected["vision_with_positions_and_head"]
    assert count(model.text) == expected["text"]
    # The released totals count the temperature and no decoder.
    assert vision + positions + count(model.text) + 1 == expected["total"]


@pytest.mark.parametrize(
    ("size", "patch", "decoder", "total"),
    [
        ("tiny", 16, 11_581_056, 28_639_297),
        ("large", 14, 111_106_560, 525_090_817),
        ("so400m", 14, 451_134_576, 1_314_361_297),
        ("huge", 14, 337_569_792, 1_305_524_993),
        ("giant", 14, 337_963_008, 2_022_297_729),
    ],
)
def test_decoder_and_total_of_the_jax_tree(size, patch, decoder, total):
    with torch.device("meta"):
        model = OpenVision(variant(size, patch, 224))
    assert count(model.decoder) == decoder
    assert count(model) == total

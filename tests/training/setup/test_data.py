"""A recipe's data: sources by weight, captions by name, orders, and what is wrong with them."""

import copy

import pytest

from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.errors import OpenVisionError
from openvision.recipe.schema import Recipe, load_recipe, parse_recipe
from openvision.runtime import SINGLE_PROCESS, Processes
from openvision.training.setup.data import open_training_data, ordering_of, require_same_data
from openvision.training.trainer import Trainer
from tests.conftest import TINY_RECIPE


def recipe(**data) -> Recipe:
    content = copy.deepcopy(TINY_RECIPE)
    content["data"] |= data
    return parse_recipe(content, "tiny")


def test_one_folder(shapes_folder) -> None:
    mixture = open_training_data(recipe().data, shapes_folder, reads_synthetic=True)
    assert [source.folder for source in mixture.sources] == [str(shapes_folder / "train")]


def test_processes_that_see_other_shards_are_refused(shapes_folder) -> None:
    """A folder that is being written, or listed from an old cache: silently, they would train on one image twice."""
    mixture = open_training_data(recipe().data, shapes_folder, reads_synthetic=True)
    require_same_data(SINGLE_PROCESS, [mixture, None])

    class SeenByTwo(Processes):
        def all_gather(self, value):
            return [value, ["more", None]]

    with pytest.raises(OpenVisionError, match="process 1 sees other shards than process 0"):
        require_same_data(SeenByTwo(), [mixture, None])


def test_several_folders_train_together(shapes_folder, tmp_path) -> None:
    with ShardWriter(tmp_path / "other") as writer:
        for sample in reversed(list(ShardDataset(shapes_folder / "validation"))):
            writer.write(f"other-{sample.key}", sample.image, sample.extension, str(sample.alt), dict(sample.meta))
    sources = [{"folder": "train", "weight": 3}, {"folder": str(tmp_path / "other"), "synthetic_key": "txt"}]
    mixed = recipe(train=sources)
    mixture = open_training_data(mixed.data, shapes_folder, mixed.reads_synthetic)
    assert (list(mixture.weights), mixture.sources[1].synthetic_key) == ([3, 1], "txt")
    Trainer(mixed, shapes_folder, tmp_path / "run").run()
    # The resolved recipe in the run folder is a recipe again.
    assert load_recipe(tmp_path / "run" / "recipe.toml") == mixed


def test_blocks(shapes_folder, tmp_path) -> None:
    blocks = recipe(order="blocks", block=4, window=8)
    assert (ordering_of(blocks.data).name, ordering_of(blocks.data).block) == ("blocks", 4)
    Trainer(blocks, shapes_folder, tmp_path / "run").run()


def test_unknown_captions_name_the_known_ones(shapes_folder) -> None:
    with pytest.raises(OpenVisionError, match=r"no captions named 're_caption'; known are .*synthetic, txt"):
        open_training_data(recipe(synthetic_key="re_caption").data, shapes_folder, reads_synthetic=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [{"folder": "train", "weight": 0}]}, "not all 0"),
        ({"train": [{"folder": "train"}, {"folder": "train"}]}, "named twice"),
    ],
)
def test_mixtures_that_mean_nothing(shapes_folder, data, message) -> None:
    with pytest.raises(OpenVisionError, match=message):
        open_training_data(recipe(**data).data, shapes_folder, reads_synthetic=True)


def test_a_misspelt_key_of_a_source() -> None:
    with pytest.raises(OpenVisionError, match="wieght"):
        recipe(train=[{"folder": "train", "wieght": 2}])

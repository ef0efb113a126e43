"""Public reports about samplers, batches and losses, each tried on this package."""

import copy
import itertools
import shutil
from pathlib import Path

import pytest
import torch

from openvision.data.batch import Batch
from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.errors import OpenVisionError
from openvision.models.openvision2 import build_model
from openvision.recipe.schema import parse_recipe
from openvision.text.tokenizer import Tokenizer
from openvision.training.objective import build_objective
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.parallel import DistributedModel
from openvision.training.step import forward_backward
from tests.conftest import TINY_RECIPE, draw
from tests.training.small_step import batch_of, recipe_of

IMAGE = draw("red", "bar", 8)


def write(folder: Path, keys: list[str], texts: list[str] | None = None) -> Path:
    with ShardWriter(folder) as writer:
        for key, text in zip(keys, texts or [f"number {key}" for key in keys], strict=True):
            writer.write(key, IMAGE, "png", text, {})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """100 samples whose keys are their numbers."""
    return write(tmp_path_factory.mktemp("hundred") / "train", [f"{number:03d}" for number in range(100)])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["number 0 1 2 3 4 5 6 7 8 9", "a very long caption of many words"], 80)


def batches(data, tokenizer, count: int, batch_size: int, start: int = 0, length: int = 8, **options) -> list[Batch]:
    spec = InputSpec(resolution=8, context_length=length, caption_length=None)
    stream = Loader(data, tokenizer, spec, batch_size=batch_size, seed=1, start=start, options=LoaderOptions(**options))
    with stream:
        return list(itertools.islice(stream, count))


def global_batches(data, tokenizer, count: int, batch_size: int, world: int, start: int = 0) -> list[list[str]]:
    """Keys of each global batch, joined from what every process reads."""
    shares = [batches(data, tokenizer, count, batch_size, start, rank=rank, world_size=world) for rank in range(world)]
    return [[key for share in shares for key in share[number].keys] for number in range(count)]


def test_no_epoch_ends_with_a_duplicate(shards, tokenizer):
    """huggingface/transformers#18730: the sampler filled the last batch of an epoch with images that were in it."""
    found = global_batches(ShardDataset(shards), tokenizer, 7, 48, 3)
    assert [len(set(keys)) for keys in found] == [48] * 7
    # Nothing is dropped for it: three epochs are in 300 positions.
    seen = [key for keys in found for key in keys][:300]
    assert all(len(set(seen[start : start + 100])) == 100 for start in (0, 100, 200))


def test_a_batch_of_one_pair_is_no_contrastive_batch():
    """openai/CLIP#83: with a batch of 1 the loss was 0 and nothing was learnt."""
    recipe = copy.deepcopy(TINY_RECIPE)
    recipe["stages"][0] |= {"batch_size": 1}
    with pytest.raises(OpenVisionError, match=r"stages\.0\.batch_size 1 leaves the contrastive loss nothing to tell"):
        parse_recipe(recipe, "one")
    recipe["loss"] = {"contrastive": 0}
    assert parse_recipe(recipe, "caption only").stages[0].steps == 64


@pytest.mark.parametrize("world", [2, 4])
def test_fewer_shards_than_processes(tmp_path, tokenizer, world):
    """roboflow/rf-detr#1396: processes had unequal numbers of batches and waited for each other for ever."""
    (tmp_path / "all").mkdir()
    for number, count in enumerate((7, 5, 1)):
        part = write(tmp_path / str(number), [f"{number}{row}" for row in range(count)])
        shutil.move(part / "000000.tar", tmp_path / f"all/{number:06d}.tar")
    found = global_batches(ShardDataset(tmp_path / "all"), tokenizer, 4, 4, world)
    assert found == global_batches(ShardDataset(tmp_path / "all"), tokenizer, 4, 4, 1)
    assert len(set(list(itertools.chain(*found))[:13])) == 13


@pytest.mark.parametrize("length", [29, 31, 32, 34])
def test_every_batch_is_full_and_nothing_is_lost(tmp_path, tokenizer, length):
    """google/grain#1351: batches of a sliced data set had the wrong size, and samples were lost at its end."""
    data = ShardDataset(write(tmp_path, [f"{number:02d}" for number in range(length)]))
    found = batches(data, tokenizer, 2 * length // 4, 4, threads=2)
    assert {len(batch.keys) for batch in found} == {4}
    keys = [key for batch in found for key in batch.keys]
    assert len(set(keys[:length])) == length


def test_the_first_text_does_not_set_the_width(tmp_path, tokenizer):
    """google/grain#1328: batches in shared memory cut every text to the length of the first."""
    keys = ["0", *(f"{number:030d}" for number in range(1, 6))]
    texts = ["a", *("a very long caption of many words " + str(number) for number in range(1, 6))]
    data = ShardDataset(write(tmp_path, keys, texts))
    (plain,), (sent,) = (batches(data, tokenizer, 1, 6, length=40, workers=workers) for workers in (0, 1))
    assert sorted(sent.keys) == sorted(keys)
    assert sent.keys == plain.keys
    assert torch.equal(sent.alt_ids, plain.alt_ids)


def test_another_number_of_processes_reads_what_is_left(shards, tokenizer):
    """huggingface/transformers#40245: a run that was resumed with more processes read samples twice and lost others."""
    data = ShardDataset(shards)
    first = global_batches(data, tokenizer, 1, 20, 1)
    rest = global_batches(data, tokenizer, 4, 20, 2, start=20)
    assert sorted(itertools.chain(*first, *rest)) == [f"{number:03d}" for number in range(100)]


def test_elastic_worlds_give_one_stream(shards, tokenizer):
    """Lightning-AI/litData#878: a run that was resumed with another number of processes read other samples."""
    data, position, found = ShardDataset(shards), 0, []
    for world, count in ((1, 2), (4, 1), (2, 3), (3, 1)):
        found += global_batches(data, tokenizer, count, 12, world, start=position)
        position += 12 * count
    assert found == global_batches(data, tokenizer, 7, 12, 1)


def test_a_stream_resumes_in_its_third_epoch(shards, tokenizer):
    """mosaicml/streaming#869: a position beyond the first epoch could not be restored."""
    data = ShardDataset(shards)
    whole = batches(data, tokenizer, 12, 24)
    resumed = batches(data, tokenizer, 2, 24, start=240)
    assert [batch.keys for batch in resumed] == [batch.keys for batch in whole[10:]]


def test_a_batch_without_any_target_has_no_gradient():
    """bytedance/UniVR#13: a prompt filled the window, all labels were masked and the loss became NaN."""
    recipe, batch = recipe_of("openvision2"), batch_of()
    batch.label_mask[:] = False
    model = DistributedModel(build_model(recipe.model).train())
    randomness = SampleRandomness(0, batch.positions.numpy(), 0.0)
    losses = forward_backward(model, build_objective(model, recipe.loss, 1), batch, randomness)
    assert losses.values()["loss"] == 0
    gradients = [parameter.grad for parameter in model.module.parameters() if parameter.grad is not None]
    assert gradients
    assert all(not gradient.any() for gradient in gradients)


def test_one_empty_target_changes_nothing_for_the_others():
    """NVIDIA-NeMo/Automodel#1985: a sample without a target made the loss of its batch NaN."""
    recipe, batch = recipe_of("openvision2"), batch_of()
    model = DistributedModel(build_model(recipe.model).train())
    objective = build_objective(model, recipe.loss, 1)

    def loss() -> float:
        randomness = SampleRandomness(0, batch.positions.numpy(), 0.0)
        return forward_backward(model, objective, batch, randomness).values()["loss"]

    assert not batch.label_mask[0].any()
    before = loss()
    batch.labels[0] = 7
    assert loss() == before > 0

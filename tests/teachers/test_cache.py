"""Features on disk are those of the views that the student sees; others are never taken for them."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.batch import from_arrays, to_arrays
from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.errors import OpenVisionError
from openvision.files import read_json_lines
from openvision.images.augment import Augment
from openvision.recipe.schema import Recipe, dump_recipe, parse_recipe
from openvision.teachers.cache import FACTS, TeacherCache
from openvision.teachers.load import load_teacher
from openvision.text.tokenizer import Tokenizer
from openvision.training.trainer import Trainer
from tests.conftest import TINY_RECIPE, draw

TOKENIZER = Tokenizer.train(["a red bar on white"], 64)
VIEWS = Augment(views=3)
TABLE = {"source": "t", "library": "untrained", "resolution": 28, "patches": 1.0, "similarity": 1.0}


def two_shards(folder: Path) -> ShardDataset:
    """Six samples in shards of four and two; the second image is broken, the fifth shares its key with nobody."""
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for number, colour in enumerate(("red", "green", "blue", "yellow", "red", "green")):
            image = draw(colour, "corner", 40 + 8 * number)
            writer.write(
                f"{colour}{number}", image[: 60 if number == 1 else None], "png", colour, {"synthetic": colour}
            )
    return ShardDataset(folder)


def batches(dataset: ShardDataset, augment: Augment, seed: int = 0, **inputs):
    spec = InputSpec(28, 8, 8, augment, **inputs)
    options = LoaderOptions(reject_budget=1.0)
    with Loader(dataset, TOKENIZER, spec, batch_size=4, seed=seed, options=options) as loader:
        return [next(loader) for _ in range(6)]


def test_a_view_is_the_same_in_every_run_and_there_are_no_others(tmp_path):
    dataset = two_shards(tmp_path / "shards")
    seen: dict[str, set[bytes]] = {}
    for seed in range(4):
        for batch in batches(dataset, VIEWS, seed):
            for key, image in zip(batch.keys, batch.images, strict=True):
                seen.setdefault(key, set()).add(image.numpy().tobytes())
    assert {len(images) for images in seen.values()} == {3}
    assert len(seen) == 5


def test_without_views_every_crop_is_new(tmp_path):
    dataset = two_shards(tmp_path / "shards")
    images = [image.numpy().tobytes() for batch in batches(dataset, Augment()) for image in batch.images]
    assert len(set(images)) == len(images)


def test_the_loader_brings_the_features_of_the_views_that_it_shows(tmp_path):
    dataset = two_shards(tmp_path / "shards")
    teacher = load_teacher("t", "untrained", 28)
    cache = TeacherCache.of(tmp_path / "cache", teacher, VIEWS, patches=True)
    assert cache.fill([dataset], teacher) == 1
    # As a loader worker gets its copy, and sends its batches.
    stored = pickle.loads(pickle.dumps(cache.stored()))
    for batch in batches(dataset, VIEWS, features=stored):
        pooled, patches = from_arrays(to_arrays(batch)).features
        # The student reads 28 px here, as the teacher does.
        found = teacher(batch.images)
        assert found.patches is not None
        torch.testing.assert_close(pooled.float(), found.pooled, atol=1e-3, rtol=0)
        torch.testing.assert_close(patches.float(), found.patches, atol=4e-3, rtol=2e-3)


def test_it_resumes_and_processes_share_the_shards(tmp_path, monkeypatch):
    dataset = two_shards(tmp_path / "shards")
    teacher = load_teacher("t", "untrained", 28)
    whole, parts = (TeacherCache.of(tmp_path / name, teacher, VIEWS, patches=False) for name in ("whole", "parts"))
    whole.fill([dataset], teacher)
    assert [len(samples) for _, _, samples in parts.missing([dataset])] == [4, 2]
    parts.fill([dataset], teacher, rank=1, size=2)
    assert [len(samples) for _, _, samples in parts.missing([dataset])] == [4]
    with pytest.raises(
        OpenVisionError, match=r"teacher t: .*parts lacks the features of 1 of 2 shards; make them with"
    ):
        parts.require([dataset], "t")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.fill([dataset], teacher, progress=stopped)
    assert [len(samples) for _, _, samples in parts.missing([dataset])] == [4]
    assert not list(parts.folder.glob("*.tmp")) + list(parts.folder.glob(".*"))
    parts.fill([dataset], teacher)
    parts.require([dataset], "t")
    files = sorted(path.name for path in whole.folder.iterdir())
    assert len(files) == 3
    for name in files:
        assert (whole.folder / name).read_bytes() == (parts.folder / name).read_bytes()
    first = np.load(whole.pooled.path(whole.folder, next(iter(dataset.places()))))
    assert np.isnan(first[1]).all()
    assert not np.isnan(first[[0, 2, 3]]).any()


def test_features_of_others_are_not_taken(tmp_path):
    dataset = two_shards(tmp_path / "shards")
    teacher = load_teacher("t", "untrained", 28)
    cache = TeacherCache.of(tmp_path / "cache", teacher, VIEWS, patches=False)
    cache.fill([dataset], teacher)
    cache.require([dataset], "t")
    with torch.no_grad():
        next(teacher.module.parameters()).add_(1e-3)
    # What another run left there is not this one's trouble.
    (cache.root / "of-another-run").mkdir()
    (cache.root / "of-another-run" / FACTS).write_text("junk")
    for other, names in (
        (TeacherCache.of(cache.root, teacher, VIEWS, patches=False), "weights_sha256"),
        (TeacherCache.of(cache.root, load_teacher("t", "untrained", 28), Augment(views=4), False), "augment.views"),
        (TeacherCache.of(cache.root, load_teacher("t", "untrained", 56), VIEWS, False), "preprocessing.size"),
    ):
        with pytest.raises(OpenVisionError, match=rf"lacks .* 2 of 2 shards \(it holds some that differ in {names}\)"):
            other.require([dataset], "t")
    with pytest.raises(OpenVisionError, match="lacks the features of 2 of 2 shards; make them"):
        with_patches = TeacherCache.of(cache.root, load_teacher("t", "untrained", 28), VIEWS, patches=True)
        with_patches.require([dataset], "t")
    changed = two_shards_with_another_image(tmp_path / "changed")
    cache = TeacherCache.of(cache.root, load_teacher("t", "untrained", 28), VIEWS, patches=False)
    with pytest.raises(OpenVisionError, match="lacks the features of 1 of 2 shards; make them"):
        cache.require([changed], "t")


def two_shards_with_another_image(folder: Path) -> ShardDataset:
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for number, colour in enumerate(("red", "green", "blue", "yellow", "red", "blue")):
            image = draw(colour, "corner", 40 + 8 * number)
            key = f"{'green' if number == 5 else colour}{number}"
            writer.write(key, image[: 60 if number == 1 else None], "png", colour, {"synthetic": colour})
    return ShardDataset(folder)


def test_a_damaged_file_is_named(tmp_path):
    dataset = two_shards(tmp_path / "shards")
    teacher = load_teacher("t", "untrained", 28)
    cache = TeacherCache.of(tmp_path / "cache", teacher, VIEWS, patches=False)
    cache.fill([dataset], teacher)
    file = cache.pooled.path(cache.folder, next(iter(dataset.places())))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        OpenVisionError, match=rf"features .*{file.name} are damaged .*delete the file and make it again"
    ):
        cache.require([dataset], "t")


def recipe_with(cache: Path | None, **changes) -> Recipe:
    table = TABLE if cache is None else TABLE | {"cache": str(cache)}
    changed = copy.deepcopy(TINY_RECIPE) | {"teacher": [table], "augment": {"views": 2}} | changes
    changed["stages"] = [{"resolution": 28, "samples": 48, "batch_size": 8, "base_learning_rate": 0.02}]
    changed["model"]["vision"] |= {"patch_size": 7, "image_size": 28}
    changed["run"] |= {"log_every": 1}
    return parse_recipe(changed, "cached")


def losses(run: Path) -> list[dict]:
    names = ("t_pooled", "t_patches", "t_similarity", "loss")
    lines = [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    return [{name: line[name] for name in names} for line in lines]


def test_a_run_with_a_cache_is_the_run_without(shapes_folder, tmp_path):
    recipe = recipe_with(tmp_path / "cache")
    with pytest.raises(OpenVisionError, match=r"teacher t: .*lacks the features of 1 of 1 shards; make them with"):
        Trainer(recipe, shapes_folder, tmp_path / "early")
    file = tmp_path / "recipe.toml"
    file.write_text(dump_recipe(recipe))
    done = CliRunner().invoke(app, ["data", "teach", str(file), "--data", str(shapes_folder)])
    assert done.exit_code == 0, done.output
    assert "1 shard to do" in done.output
    again = CliRunner().invoke(app, ["data", "teach", str(file), "--data", str(shapes_folder)])
    assert "0 shards to do" in again.output
    Trainer(recipe, shapes_folder, tmp_path / "cached").run()
    Trainer(recipe_with(None), shapes_folder, tmp_path / "computed").run()
    cached, computed = losses(tmp_path / "cached"), losses(tmp_path / "computed")
    assert len(cached) == 6
    for one, other in zip(cached, computed, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)
    assert "features from" in json.dumps((tmp_path / "cached" / "sessions.json").read_text())


@pytest.mark.slow
def test_processes_make_the_features_and_learn_from_them(shapes_folder, tmp_path):
    """Two under torchrun share the shards of `data teach`, then train with DDP; the losses are those of one process."""
    data = tmp_path / "data" / "train"
    with ShardWriter(data, samples_per_shard=5) as writer:
        for sample in ShardDataset(shapes_folder / "train"):
            writer.write(sample.key, sample.image, sample.extension, str(sample.alt), {"synthetic": sample.synthetic})
    recipe = recipe_with(tmp_path / "cache", data=TINY_RECIPE["data"] | {"validation": None})
    file = tmp_path / "recipe.toml"
    file.write_text(dump_recipe(recipe))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    launch += ["openvision.cli.main"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def together(*arguments: str) -> str:
        done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shards = len(list(data.glob("*.tar")))
    assert shards > 2
    said = together("data", "teach", str(file), "--data", str(data.parent))
    assert said.count(f"{shards} shards to do") == 1
    assert "0 shards to do" in together("data", "teach", str(file), "--data", str(data.parent))
    together("train", str(file), "--data", str(data.parent), "--run", str(tmp_path / "two"))
    Trainer(recipe, data.parent, tmp_path / "one").run()
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_bad_recipes(tmp_path):
    with pytest.raises(OpenVisionError, match=r"teacher.0.cache holds features of fixed views .* set augment.views"):
        recipe_with(tmp_path, augment={})
    file = tmp_path / "recipe.toml"
    file.write_text(dump_recipe(recipe_with(None)))
    done = CliRunner().invoke(app, ["data", "teach", str(file), "--data", str(tmp_path)])
    assert done.exit_code != 0
    assert "no teacher has a cache; set teacher.0.cache to a folder" in done.output + str(done.exception)

"""Damaged folders of shards: every command gives one sentence or a count, and `verify` finds what stops the others."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hostile import SIZES, Count, conclude, copied, damage, generator, mutate, take_name
from safetensors.numpy import load, save
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.recap.index import shard_names, tar_samples
from openvision.data.shards.dataset import ShardDataset, ShardWriter, unpack_images
from openvision.data.shards.manifest import index_folder
from openvision.data.shards.store import LocalStore
from openvision.data.tools.stats import gather
from openvision.data.tools.verify import Finding, verify
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import captioned_shards
from openvision.images.decode import BadSampleError
from openvision.inference.embed import images_of
from openvision.text.tokenizer import Tokenizer
from tests.conftest import COLOURS, SHAPES, draw

TOKENIZER = Tokenizer.train(["red bar", "A bar. It is red."], 60)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Two indexed shards of eight samples, the first with a captions tar."""
    folder = tmp_path_factory.mktemp("hostile") / "shards"
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    with ShardWriter(folder, samples_per_shard=8) as writer:
        for colour, shape in pairs:
            texts = f"{colour} {shape}", {"synthetic": f"A {shape}."}
            writer.write(f"{colour}-{shape}", draw(colour, shape, 16), "png", *texts)
    with tarfile.open(folder / "000000.captions.tar", "w") as tar:
        for colour, shape in pairs[:8]:
            data = b'{"re_caption": "A drawing."}'
            info = tarfile.TarInfo(f"{colour}-{shape}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_folder(LocalStore(folder))
    return folder


def _train(folder: Path) -> None:
    dataset, options = ShardDataset(folder), LoaderOptions(reject_budget=1.0)
    with Loader(dataset, TOKENIZER, InputSpec(16, 8, 8), batch_size=8, seed=0, options=options) as loader:
        next(loader)


def _load_all(count: int, load: Callable[[int], object]) -> None:
    for index in range(count):
        try:
            load(index)
        except BadSampleError:
            continue


def _encode(folder: Path) -> None:
    images = images_of(folder)
    _load_all(len(images.keys), images.load)


def _evaluate(folder: Path) -> None:
    images = captioned_shards(folder, "synthetic").images
    _load_all(len(images), images.load)


def _recap(folder: Path) -> None:
    store = LocalStore(folder)
    for name in shard_names(store):
        for sample in tar_samples(store, name):
            sample.identities(sample.meta() or {})


READERS: dict[str, Callable[[Path], object]] = {
    "stats": lambda folder: gather(ShardDataset(folder)),
    "unpack": lambda folder: unpack_images(ShardDataset(folder), folder.parent / "images"),
    "train": _train,
    "encode": _encode,
    "eval": _evaluate,
    "recap": _recap,
    "index": lambda folder: index_folder(LocalStore(folder)),
    "index --rebuild": lambda folder: index_folder(LocalStore(folder), rebuild=True),
}


def mutated_index(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """An index with one value of its header, or one array, changed."""
    arrays = load(data)
    head = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["openvision"])
    if rng.random() < 0.5:
        what, head = mutate(head, rng)
    else:
        part = rng.choice(sorted(arrays))
        array, ways = arrays.pop(part), {}
        ways["is gone"] = None
        ways["is zero"] = np.zeros_like(array)
        ways["is huge"] = np.full_like(array, np.iinfo(array.dtype).max)
        ways["is -1"] = np.full_like(array, -1) if array.dtype == np.int64 else array[::-1]
        ways["is float"] = array.astype(np.float32)
        ways["is cut"] = array[:-1]
        ways["is flat"] = array.reshape(-1)
        ways["is empty"] = array[:0]
        ways["is a scalar"] = np.array(3, dtype=array.dtype)
        way = rng.choice(list(ways))
        if (changed := ways[way]) is not None:
            arrays[part] = np.ascontiguousarray(changed)
        what = f"{part} {way}"
    return what, save(arrays, metadata={"openvision": json.dumps(head)})


def damage_shards(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder of shards; sometimes without the manifest, so that the index is read first."""
    path = rng.choice(sorted(folder.iterdir()))
    if path.suffix == ".index" and rng.random() < 0.7:
        what, data = mutated_index(path.read_bytes(), rng)
        path.write_bytes(data)
    else:
        what = damage(path, rng)
    if rng.random() < 0.5:
        manifest = folder / "shards.json"
        if manifest != path:
            manifest.unlink()
            what += ", without a manifest"
    return f"{path.name} {what}"


@pytest.mark.parametrize("times", SIZES)
def test_damaged_shards(shards, tmp_path, times) -> None:
    rng, count = generator(4, times), Count()
    for number in range(12 * times):
        found: list[Finding] = []
        with copied(shards, tmp_path / "verified") as folder:
            before = rng.getstate()
            what = f"{number}: {damage_shards(folder, rng)}"
            count.attempt("verify", what, partial(_verify, folder, found))
        for kind, read in READERS.items():
            stopped: list[OpenVisionError] = []
            with copied(shards, tmp_path / "copy") as folder:
                rng.setstate(before)
                damage_shards(folder, rng)
                count.attempt(kind, what, partial(_read, folder, read, stopped))
            if stopped and not found:
                count.failures.append(f"{kind}, {what}: verify finds nothing, but: {stopped[0]}")
    conclude(count, 12 * 8 * (1 + len(READERS)), times)


def _verify(folder: Path, found: list[Finding]) -> None:
    """A damaged shard is a finding, and the others are still read."""
    try:
        found += verify(folder).findings
    except OpenVisionError as error:
        raise AssertionError(f"verify stopped: {error}") from error


def _read(folder: Path, read: Callable[[Path], object], stopped: list[OpenVisionError]) -> None:
    try:
        read(folder)
    except OpenVisionError as error:
        stopped.append(error)
        raise


@pytest.mark.parametrize("name", ["shards.json", "000000.tar", "000000.index", "000000.captions.tar", "000009.tar"])
@pytest.mark.parametrize("kind", ["pipe", "dangling link", "folder", "link to itself"])
def test_names_without_a_file_are_refused_at_once(shards, tmp_path, name, kind) -> None:
    with copied(shards, tmp_path / "copy") as folder:
        (folder / name).touch()
        take_name(folder / name, kind)
        for command in ("stats", "verify"):
            result = CliRunner().invoke(app, ["data", command, str(folder)])
            assert result.exit_code == 1
            said = str(result.exception) if command == "stats" else result.output
            assert str(folder / name) in said.replace("\n", "")
            assert "broken_" in said or isinstance(result.exception, OpenVisionError)


def test_a_manifest_that_hides_a_sample_is_refused(shards, tmp_path) -> None:
    with copied(shards, tmp_path / "copy") as folder:
        content = json.loads((folder / "shards.json").read_text())
        content["shards"][0]["samples"] = 7
        (folder / "shards.json").write_text(json.dumps(content))
        dataset = ShardDataset(folder)
        with pytest.raises(OpenVisionError, match=r"000000\.index has 8 samples, but shards\.json says 7"):
            dataset[0]
        assert [finding.reason for finding in verify(folder).findings] == ["broken_manifest"]

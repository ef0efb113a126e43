"""Folders of vectors: complete, resumable, searched exactly or approximately, and of one checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.inference import index as index_module
from openvision.inference import vector_folder as module
from openvision.inference.encoder import Encoder
from openvision.inference.index import VectorIndex, build_approximate
from openvision.inference.vector_folder import MANIFEST, encode_folder, open_vector_folder
from openvision.inference.vision import VisionEncoder
from openvision.models.vision import VisionTransformer


@pytest.fixture
def many(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(11):
        pixels = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (folder / "05.png").write_bytes(b"no picture")
    return folder


def made(folder, shards, width=8, model="somebody's"):
    """A complete folder of vectors without images."""
    folder.mkdir()
    rng, counts = np.random.default_rng(1), []
    for number, count in enumerate(shards):
        # Clusters, as embeddings of images have them.
        centres = np.random.default_rng(2).normal(size=(40, width))
        vectors = centres[rng.integers(0, 40, count)] + 0.3 * rng.normal(size=(count, width))
        names = [f"{number}-{row}" for row in range(count)]
        module.write_shard(folder / f"{number:06d}.npy", names, module.unit_rows(vectors.astype(np.float32)), {})
        counts.append(count)
    job = module.Job("/", "", "", model, [8, 8], "crop", max(shards), "npy")
    module.write_manifest(folder, job, width, counts)
    return folder


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_every_readable_image_once_in_order(encoder, many, tmp_path, kind):
    result = encode_folder(encoder, many, tmp_path / "index", batch_size=3, shard=4, kind=kind)
    assert (result.encoded, [name for name, _ in result.skipped]) == (10, ["05.png"])
    vectors = open_vector_folder(tmp_path / "index")
    assert vectors.counts == (4, 3, 3)
    names = [vectors.name(number) for number in range(10)]
    assert names == [f"{number:02d}.png" for number in range(11) if number != 5]
    expected = encoder.encode_images([many / name for name in names]).numpy()
    assert np.allclose(np.concatenate(list(vectors.blocks())), expected, atol=1e-6)
    assert np.allclose(vectors.rows(np.array([9, 0, 4])), expected[[9, 0, 4]], atol=1e-6)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_stopped_job_resumes_and_ends_the_same(encoder, many, tmp_path, monkeypatch, kind):
    encode_folder(encoder, many, tmp_path / "whole", batch_size=2, shard=4, kind=kind)
    write, written = module.write_shard, []

    def stop_at_the_third(file, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.stem)
        write(file, *rest)

    monkeypatch.setattr(module, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode_folder(encoder, many, tmp_path / "index", batch_size=2, shard=4, kind=kind)
    with pytest.raises(OpenVisionError, match="not complete; run the same"):
        VectorIndex.open(tmp_path / "index")
    # A kill between the names of a shard and its vectors leaves names that nothing reads.
    (tmp_path / "index/000002.json").write_text('{"names": [], "skipped": {}}')
    monkeypatch.setattr(module, "write_shard", lambda file, *rest: (written.append(file.stem), write(file, *rest)))
    encode_folder(encoder, many, tmp_path / "index", batch_size=2, shard=4, kind=kind)
    assert written == ["000000", "000001", "000002"]
    if kind == "parquet":
        (tmp_path / "index/000002.json").unlink()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}


def test_search_is_brute_force(encoder, many, tmp_path):
    encode_folder(encoder, many, tmp_path / "index", shard=4)
    index = VectorIndex.open(tmp_path / "index")
    query = encoder.encode_texts(["a red picture"])[0]
    hits = index.search(query.numpy(), 3)
    expected = encoder.search(many, "a red picture", 3)
    assert [hit.name for hit in hits] == [path.name for path, _ in expected]
    assert [hit.cosine for hit in hits] == pytest.approx([cosine for _, cosine in expected], abs=1e-6)
    assert index.search(encoder.encode_unit([many / "07.png"])[0].numpy(), 1)[0].name == "07.png"
    assert len(index.search(query.numpy(), 99)) == 10


def test_ties_keep_the_order_of_the_images(tmp_path):
    folder = made(tmp_path / "index", (40, 40))
    vectors = open_vector_folder(folder)
    same = np.tile(vectors.rows(np.array([3])), (40, 1))
    for shard in range(2):
        np.save(folder / f"{shard:06d}.npy", same)
    numbers, _ = VectorIndex.open(folder).nearest(same[0], 5)
    assert numbers.tolist() == [0, 1, 2, 3, 4]


def test_a_tower_without_a_head_gives_pooled_vectors_of_unit_length(encoder, many, tmp_path):
    bare = VisionEncoder(VisionTransformer(encoder.vision.config, None))
    encode_folder(bare, many, tmp_path / "index")
    block = next(open_vector_folder(tmp_path / "index").blocks())
    assert np.allclose(np.linalg.norm(block, axis=1), 1, atol=1e-6)
    assert np.allclose(block[0], bare.encode_unit([many / "00.png"])[0].numpy(), atol=1e-6)


def test_vectors_of_another_checkpoint_are_refused(encoder, many, tmp_path):
    encode_folder(encoder, many, tmp_path / "index")
    index = VectorIndex.open(tmp_path / "index")
    index.check_encoder(encoder)
    with pytest.raises(OpenVisionError, match="encoded at 32 x 32 px"):
        index.check_encoder(Encoder(encoder.model, None, resolution=16))
    with torch.no_grad():
        encoder.vision.cls_token.add_(1)
    with pytest.raises(OpenVisionError, match=r"vectors of another checkpoint, .*model; give that checkpoint, or"):
        index.check_encoder(encoder)
    with pytest.raises(OpenVisionError, match=r"another job \(weights differ\)"):
        encode_folder(encoder, many, tmp_path / "index")


def test_what_is_no_folder_of_vectors(encoder, many, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(OpenVisionError, match="is no folder of vectors"):
        encode_folder(encoder, many, tmp_path / "mine")
    with pytest.raises(OpenVisionError, match="format 'csv' is unknown"):
        encode_folder(encoder, many, tmp_path / "index", kind="csv")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"no picture")
    with pytest.raises(OpenVisionError, match="none of the 1 images"):
        encode_folder(encoder, bad, tmp_path / "index")
    assert list((tmp_path / "index").iterdir()) == []
    with pytest.raises(OpenVisionError, match="mine is no folder of vectors; `openvision encode IMAGES"):
        VectorIndex.open(tmp_path / "mine")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MANIFEST).write_text("{}"), "not of version"),
        (lambda folder: _change(folder, shards=[10, -1]), "manifest.json is broken"),
        (lambda folder: _change(folder, resolution=3), "manifest.json is broken"),
        (lambda folder: _change(folder, source=None), "manifest.json is broken"),
        (lambda folder: _change(folder, shards=[7]), "another shape"),
        (lambda folder: (folder / "000000.npy").unlink(), "does not exist"),
        (lambda folder: (folder / "000000.npy").write_bytes(b"\x93NUMPY"), "is no shard of vectors"),
        (lambda folder: (folder / "000000.json").write_text('{"names": "ab", "skipped": {}}'), "is no shard of"),
    ],
)
def test_damage_is_one_sentence(tmp_path, damage, message):
    folder = made(tmp_path / "index", (10,))
    damage(folder)
    with pytest.raises(OpenVisionError, match=message) as caught:
        VectorIndex.open(folder).search(np.ones(8, np.float32))
    assert "\n" not in str(caught.value)


def _change(folder, **changes):
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text()) | changes))


def test_pickles_are_never_read(tmp_path):
    folder = made(tmp_path / "index", (2,))
    np.save(folder / "000000.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(OpenVisionError, match="is no shard of vectors"):
        VectorIndex.open(folder).search(np.ones(8, np.float32))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = made(tmp_path_factory.mktemp("large") / "index", (6000, 5000), width=16)
    return folder, build_approximate(folder, 0.95)


def test_the_approximate_index_reaches_its_recall(large):
    folder, built = large
    assert built.recall >= 0.95
    assert 1 <= built.probes < built.lists
    exact, approximate = VectorIndex.open(folder, exact=True), VectorIndex.open(folder)
    assert (exact.is_approximate, approximate.is_approximate) == (False, True)
    rng = np.random.default_rng(5)
    found = []
    for row in rng.integers(0, 11_000, 40):
        query = exact.vectors.rows(np.array([row]))[0] + 0.05 * rng.normal(size=16).astype(np.float32)
        query /= np.linalg.norm(query)
        truth, cosines = exact.nearest(query, 10)
        numbers, near = approximate.nearest(query, 10)
        found.append(len(set(truth) & set(numbers)) / 10)
        # Those that are found have their exact cosines.
        shared = [list(truth).index(number) for number in numbers if number in truth]
        assert np.allclose(
            [cosines[at] for at in shared], [c for n, c in zip(numbers, near, strict=True) if n in truth]
        )
    assert np.mean(found) >= 0.9


def test_an_approximate_index_of_other_vectors_is_refused(large, tmp_path):
    folder = shutil.copytree(large[0], tmp_path / "index")
    _change(folder, model="another")
    with pytest.raises(OpenVisionError, match="belongs to other vectors"):
        VectorIndex.open(folder)
    assert VectorIndex.open(folder, exact=True).vectors.total == 11_000
    build_approximate(folder, 0.5)
    (folder / index_module.LISTS).write_bytes(b"nothing")
    with pytest.raises(OpenVisionError, match="cannot be read"):
        VectorIndex.open(folder)


def test_few_vectors_need_no_index(tmp_path):
    with pytest.raises(OpenVisionError, match="has 10 vectors; below 10000 exact search is as fast"):
        build_approximate(made(tmp_path / "index", (10,)))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands(model_folder, many, tmp_path):
    done = run("encode", many, "-o", tmp_path / "index", "--model", model_folder, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "10 images encoded, 1 skipped" in done.output
    by_text = run("search", tmp_path / "index", "a red picture", "--top", 3, "--model", model_folder)
    assert by_text.exit_code == 0, by_text.output
    folder = run("search", many, "a red picture", "--top", 3, "--model", model_folder)
    assert [line.split("/")[-1] for line in folder.stdout.splitlines()] == [
        line.split()[-1] for line in by_text.stdout.splitlines()
    ]
    by_image = run("search", tmp_path / "index", "--image", many / "03.png", "--top", 1, "--model", model_folder)
    assert by_image.stdout.split() == ["1.000", "03.png"]
    refused = run("search", tmp_path / "index", "--model", model_folder)
    assert "give either a text" in str(refused.exception)
    refused = run("search", many, "--image", many / "03.png", "--model", model_folder)
    assert "openvision encode" in str(refused.exception)
    refused = run("encode", many, "-o", tmp_path / "a.parquet", "--format", "npy", "--model", model_folder)
    assert "--format is for an output folder" in str(refused.exception)
    refused = run("index", tmp_path / "index")
    assert "needs no index" in str(refused.exception)

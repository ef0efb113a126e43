"""Many pictures into one file: complete, resumable, and honest about what it could not read."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.shards.dataset import ShardWriter
from openvision.errors import OpenVisionError
from openvision.inference import embed as module
from openvision.inference.embed import embed, read_features


@pytest.fixture
def many(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(11):
        pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    (folder / "05.png").write_bytes(b"no picture")
    return folder


def names(folder, without=("05.png",)) -> list[str]:
    return [path.name for path in sorted(folder.iterdir()) if path.name not in without]


def test_every_readable_picture_once_in_order(encoder, many, tmp_path) -> None:
    result = embed(encoder, many, tmp_path / "f.safetensors", batch_size=3, part=4)
    keys, features = read_features(tmp_path / "f.safetensors")
    assert keys == names(many)
    assert result.encoded == 10
    assert [name for name, _ in result.skipped] == ["05.png"]
    expected = encoder.encode_images([many / key for key in keys])
    assert torch.allclose(features, expected, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"many", "f.safetensors"}


def test_it_goes_on_where_it_was_stopped(encoder, many, tmp_path, monkeypatch) -> None:
    embed(encoder, many, tmp_path / "whole.safetensors", batch_size=2, part=4)
    write, written = module._write_part, []

    def stop_at_the_third(file, *rest) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        write(file, *rest)

    monkeypatch.setattr(module, "_write_part", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed(encoder, many, tmp_path / "f.safetensors", batch_size=2, part=4)
    assert not (tmp_path / "f.safetensors").exists()
    monkeypatch.setattr(module, "_write_part", lambda file, *rest: (written.append(file.name), write(file, *rest)))
    embed(encoder, many, tmp_path / "f.safetensors", batch_size=2, part=4)
    assert written == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    assert (tmp_path / "f.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_parts_of_another_job_are_not_mixed_in(encoder, many, tmp_path) -> None:
    parts = tmp_path / ".f.safetensors.parts"
    parts.mkdir()
    (parts / "job.json").write_text(json.dumps({"pictures": "others"}))
    with pytest.raises(OpenVisionError, match="parts of another job"):
        embed(encoder, many, tmp_path / "f.safetensors")


def test_parquet_has_the_same_rows(encoder, many, tmp_path) -> None:
    from pyarrow import parquet

    embed(encoder, many, tmp_path / "f.safetensors", part=4)
    embed(encoder, many, tmp_path / "f.parquet", part=4)
    keys, features = read_features(tmp_path / "f.safetensors")
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column("key").to_pylist() == keys
    assert np.array_equal(np.stack(table.column("embedding").to_numpy()), features.numpy())


def test_shards(encoder, many, tmp_path) -> None:
    with ShardWriter(tmp_path / "shards", samples_per_shard=4) as writer:
        for name in names(many):
            writer.write(name.removesuffix(".png"), (many / name).read_bytes(), "png", "a picture", {})
    embed(encoder, tmp_path / "shards", tmp_path / "f.safetensors", part=3)
    keys, features = read_features(tmp_path / "f.safetensors")
    assert keys == [name.removesuffix(".png") for name in names(many)]
    assert torch.allclose(features, encoder.encode_images([many / f"{key}.png" for key in keys]), atol=1e-6)


def test_a_tower_without_a_head_gives_pooled_vectors(encoder, many, tmp_path) -> None:
    from openvision.inference.vision import VisionEncoder
    from openvision.models.vision import VisionTransformer

    bare = VisionTransformer(encoder.vision.config, None)
    embed(VisionEncoder(bare), many, tmp_path / "f.safetensors")
    assert load_file(tmp_path / "f.safetensors")["features"].shape == (10, 32)


def test_bad_input(encoder, many, tmp_path) -> None:
    with pytest.raises(OpenVisionError, match=r"must end in \.safetensors or \.parquet"):
        embed(encoder, many, tmp_path / "f.csv")
    (tmp_path / "f.safetensors").write_text("mine")
    with pytest.raises(OpenVisionError, match="exists"):
        embed(encoder, many, tmp_path / "f.safetensors")
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "a.png").write_bytes(b"no picture")
    with pytest.raises(OpenVisionError, match="none of the 1 images"):
        embed(encoder, only_bad, tmp_path / "g.safetensors")
    assert not (tmp_path / "g.safetensors").exists()


def test_the_command(model_folder, many, tmp_path) -> None:
    arguments = ["encode", str(many), "-o", str(tmp_path / "f.safetensors"), "--checkpoint", str(model_folder)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "10 images encoded, 1 skipped" in result.output
    assert "skipped: 05.png" in result.output

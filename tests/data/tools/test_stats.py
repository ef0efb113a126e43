"""The numbers about shards are those of what was written into them."""

import io
import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.data.tools.stats import even_sample, gather, read_header, spread
from openvision.data.tools.stats_report import write_plots
from openvision.images.decode import BadSampleError
from openvision.text.tokenizer import Tokenizer


def encoded(width: int, height: int, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(width: int, height: int) -> bytes:
    """A JPEG whose header says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(width, height, "JPEG", exif=exif)


SAMPLES = (
    ("a", encoded(40, 20), "png", "red car", "A red car. It is on a road."),
    ("b", turned(60, 30), "jpg", "red car", "One. Two. Three."),
    ("c", encoded(10, 10, "WEBP"), "webp", "word " * 90, None),
    ("d", b"not an image", "png", "lost", "lost"),
)


@pytest.fixture
def dataset(tmp_path) -> ShardDataset:
    with ShardWriter(tmp_path / "shards", samples_per_shard=2) as writer:
        for key, image, extension, text, caption in SAMPLES:
            writer.write(key, image, extension, text, {} if caption is None else {"synthetic": caption})
    return ShardDataset(tmp_path / "shards")


def test_images(dataset):
    summary = gather(dataset).summary()
    images = summary["pictures"]
    assert (summary["samples"], summary["read"], summary["rejected"]) == (4, 3, {"undecodable": 1})
    assert images["formats"] == {"png": 1, "jpeg": 1, "webp": 1}
    # The turned one counts as it is seen: 30 wide and 60 high.
    assert (images["width"]["min"], images["width"]["max"], images["height"]["max"]) == (10, 40, 60)
    assert (images["aspect"]["min"], images["aspect"]["median"], images["aspect"]["max"]) == (0.5, 1, 2)
    assert images["total_bytes"] == sum(len(image) for _, image, *_ in SAMPLES[:3])
    assert images["distinct"] == 3


def test_texts_in_words(dataset):
    texts = gather(dataset).summary()["texts"]
    assert (texts["alt"]["texts"], texts["alt"]["distinct"], texts["alt"]["distinct_words"]) == (3, 2, 3)
    assert texts["alt"]["words"]["mean"] == pytest.approx((2 + 2 + 90) / 3, abs=1e-3)
    assert texts["alt"]["words"]["over_80"] == pytest.approx(1 / 3, abs=1e-5)
    assert texts["alt"]["words"]["over_128"] == 0
    assert (texts["synthetic"]["texts"], texts["synthetic"]["samples_without"]) == (2, 1)
    assert texts["sentence"]["texts"] == 5
    assert "tokens" not in texts["alt"]


@pytest.mark.parametrize(("words", "cut"), [(77, 0.0), (78, 1.0)])
def test_what_a_tower_cuts_is_what_the_tokenizer_cuts(tmp_path, words, cut):
    text = " ".join(["car"] * words)
    with ShardWriter(tmp_path / "one") as writer:
        writer.write("a", encoded(4, 4), "png", text, {"synthetic": text})
    tokenizer = Tokenizer.train(["car car car"], 40)
    tokens = gather(ShardDataset(tmp_path / "one"), tokenizer).summary()["texts"]["alt"]["tokens"]
    assert tokens["median"] == words
    assert tokens["cut_at_80"] == cut == tokenizer.encode_counting([text], 80)[1]
    assert tokens["over_80"] == 0


def test_a_sample_is_even_and_always_the_same(dataset):
    assert list(even_sample(10, None)) == list(even_sample(10, 10)) == list(range(10))
    assert list(even_sample(10, 2)) == [2, 7]
    assert list(even_sample(1000, 4)) == [125, 375, 625, 875]
    # One of each shard.
    assert gather(dataset, limit=2).summary()["pictures"]["formats"] == {"jpeg": 1}


def test_a_header_is_enough():
    whole = encoded(300, 200)
    assert read_header(whole[:60]) == (300, 200, "png")
    with pytest.raises(BadSampleError) as bad:
        read_header(b"")
    assert bad.value.reason == "undecodable"


def test_nothing_has_no_spread():
    assert spread([]) is None
    assert spread([3.0]) == dict.fromkeys(("min", "p5", "median", "mean", "p95", "max"), 3.0)


def test_plots_are_drawn_also_where_there_is_nothing(tmp_path):
    with ShardWriter(tmp_path / "one") as writer:
        writer.write("a", encoded(4, 4), "png", "", {})
    for path in write_plots(gather(ShardDataset(tmp_path / "one")), tmp_path / "plots"):
        with Image.open(path) as image:
            assert image.width > 1000


def test_the_command(dataset, tmp_path):
    Tokenizer.train(["red car on a road"], 40).save(tmp_path)
    output, plots = tmp_path / "stats.json", tmp_path / "plots"
    arguments = ["data", "stats", dataset.folder, "--tokenizer", tmp_path, "-o", output, "--plots", plots]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "cut in a text tower of 80" in result.output
    assert "left out, undecodable: 1" in result.output
    assert json.loads(output.read_text())["texts"]["alt"]["tokens"]["cut_at_80"] == pytest.approx(1 / 3, abs=1e-5)
    assert sorted(path.name for path in plots.iterdir()) == ["captions.png", "images.png"]

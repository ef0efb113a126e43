"""Statistics of new captions, near-duplicates, and the page."""

import io
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.data.shards.dataset import ShardWriter
from openvision.errors import OpenVisionError
from openvision.files import read_json
from openvision.recaption.captioners.endpoint import Endpoint
from openvision.recaption.duplicates import fingerprint, near_duplicates
from openvision.recaption.job import recaption_shards
from openvision.recaption.prompts import load_prompt
from openvision.recaption.report import ReportOptions, write_report
from openvision.recaption.shard import Options
from tests.recaption.server import serving


def drawing(seed: int, side: int = 96) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(rng.integers(0, 255, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, size = (rng.integers(0, 90, 3) * side // 96).tolist()
        pen.ellipse((x, y, x + size + 8, y + size + 8), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def again(image: Image.Image, kind: str, **options: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded(image, kind, **options))).convert("RGB"))


def test_near_duplicates_survive_scaling_and_compression():
    images = [np.asarray(drawing(seed)) for seed in range(60)]
    images.append(again(drawing(7), "JPEG", quality=30))
    images.append(np.asarray(drawing(7).resize((61, 61), Image.Resampling.BILINEAR)))
    images.append(again(drawing(30), "WEBP", quality=40))
    # Plain images of different colours have the same hash and are not alike.
    images += [np.full((20, 20, 3), value, dtype=np.uint8) for value in (10, 90, 200, 90)]
    found = near_duplicates([fingerprint(pixels) for pixels in images])
    assert found == [[7, 60, 61], [30, 62], [64, 66]]
    # Nor are small objects in the same places of one background.
    small = [Image.new("RGB", (96, 96), (250, 230, 100)) for _ in range(2)]
    for image, colours in zip(small, (("red", "blue"), ("black", "gray")), strict=True):
        for place, colour in enumerate(colours):
            ImageDraw.Draw(image).ellipse((10 + 50 * place, 40, 22 + 50 * place, 52), fill=colour)
    assert near_duplicates([fingerprint(np.asarray(image)) for image in small]) == []
    assert [fingerprint(pixels).is_plain for pixels in images[-5:]] == [False, True, True, True, True]


@pytest.fixture
def job(tmp_path):
    with ShardWriter(tmp_path / "shards", samples_per_shard=5) as writer:
        for number in range(10):
            image = drawing(number if number < 7 else 100)
            writer.write(f"{number:04d}", encoded(image), "png", f"alt <b>{number}</b>", {})
    refusal = ["I'm sorry, but I can't see it."] * 2
    with serving(captions={drawing(2).getpixel((0, 0))[0]: refusal}) as server:  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        endpoint = Endpoint(server.url)
        prompt = load_prompt("v1")
        recaption_shards(str(tmp_path / "shards"), endpoint, prompt, tmp_path / "out", Options(), lambda line: None)
    return tmp_path / "out"


def test_numbers_and_page(job, tmp_path, tiny_run):
    arguments = ["recaption-report", str(job), "-o", str(tmp_path / "page.html"), "--placeholder", "3"]
    done = CliRunner().invoke(app, [*arguments, "--encoder", str(tiny_run), "--numbers", str(tmp_path / "n.json")])
    assert done.exit_code == 0, done.output
    assert "placeholders\t1 groups; 0 plain images" in done.output
    found = read_json(tmp_path / "n.json")
    assert (found["read"], found["job"]["bad_refusal"], found["job"]["shards_missing"]) == (10, 1, 0)
    assert found["near_duplicates"]["placeholders"] == [["0007", "0008", "0009"]]
    # "alt b 3 b": markup counts as words; "a plain image of colour" and three numbers.
    assert found["texts"]["alt"]["words"]["mean"] == 4
    assert found["texts"]["recaption"]["words"]["median"] == 8
    assert (found["texts"]["recaption"]["texts"], found["texts"]["recaption"]["samples_without"]) == (9, 1)
    # The similarity is that of the encoder, for the images with both texts.
    encoder = openvision.load(tiny_run)
    pictures = [drawing(number if number < 7 else 100) for number in range(10) if number != 2]
    alts = encoder.encode_texts([f"alt <b>{number}</b>" for number in range(10) if number != 2])
    expected = (encoder.encode_images(pictures) * alts).sum(dim=1).mean().item()
    assert found["similarity"]["images"] == 9
    assert found["similarity"]["alt"]["mean"] == pytest.approx(expected, abs=1e-3)
    page = (tmp_path / "page.html").read_text()
    assert "alt &lt;b&gt;3&lt;/b&gt;" in page
    assert "<b>3</b>" not in page
    assert page.count('class="caption"') == 10
    assert len(re.findall(r"seed \d+", page)) == 9
    assert "http://" not in re.sub(r"http://127\.0\.0\.1:\d+/v1", "", page)


def test_without_an_encoder_and_of_some_samples(job, tmp_path):
    found = write_report(job, tmp_path / "page.html", ReportOptions(limit=4, samples=2))
    assert found["read"] == 4
    assert "similarity" not in found
    assert (tmp_path / "page.html").read_text().count('class="caption"') == 2
    with pytest.raises(OpenVisionError, match="holds no recaption job"):
        write_report(tmp_path, tmp_path / "page.html", ReportOptions())

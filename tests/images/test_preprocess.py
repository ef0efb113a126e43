"""Pixels against the original's, and pictures of every kind."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openvision.images import preprocess
from openvision.images.decode import BadSampleError, decode_image
from openvision.images.preprocess import resize, resize_center_crop, squash
from openvision.models.vision import normalize


@pytest.fixture(scope="module")
def golden(golden_folder):
    with np.load(golden_folder / "image_ops.npz") as archive:
        return {name: archive[name] for name in archive.files}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [64, 160])
def test_evaluation_crop_equals_the_original(golden, size):
    ours = resize_center_crop(golden["image"], size).astype(int)
    difference = np.abs(ours - golden[f"small{size}"].astype(int))
    assert ours.shape == (size, size, 3)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


def test_resize_truncates(golden):
    name = next(name for name in golden if name.startswith("rs_float"))
    expected = golden[name]
    ours = resize(golden["image"], *expected.shape[:2])
    assert (ours != expected.astype(np.uint8)).mean() <= 1e-4
    assert ours.mean() < np.round(expected).mean()


def test_normalize_equals_the_original(golden):
    names = [name for name in golden if name.startswith("vgg")]
    assert names
    for name in names:
        size = golden[name].shape[0]
        image = torch.from_numpy(golden[f"small{size}"]).permute(2, 0, 1)[None]
        ours = normalize(image)[0].permute(1, 2, 0).numpy()
        assert np.abs(ours - golden[name]).max() < 1e-5


def test_squash_ignores_the_aspect():
    image = np.zeros((10, 40, 3), dtype=np.uint8)
    image[:, 20:] = 200
    assert squash(image, 8).shape == (8, 8, 3)
    assert (squash(image, 8)[:, 5:] >= 199).all()
    assert (squash(image, 8)[:, :3] == 0).all()


def reason_of(data: bytes) -> str:
    with pytest.raises(BadSampleError) as caught:
        decode_image(data)
    return caught.value.reason


def colour(mode: str, size=(6, 4)) -> Image.Image:
    return Image.new("RGB", size, (200, 100, 50)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "CMYK", "L", "LA", "1"])
def test_every_mode_becomes_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    pixels = decode_image(encoded(colour(mode), kind))
    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8
    if mode in ("RGB", "P", "RGBA", "CMYK"):
        assert np.abs(pixels[0, 0].astype(int) - (200, 100, 50)).max() <= 30


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert decode_image(encoded(image)).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    assert decode_image(encoded(Image.fromarray(values)))[0, :, 0].tolist() == [0, 100, 255]


def test_a_dark_picture_of_sixteen_bits_stays_dark():
    assert decode_image(encoded(Image.fromarray(np.full((1, 1), 200, dtype=np.uint16)))).tolist() == [[[0, 0, 0]]]


def test_a_strip_too_long_for_a_square_is_refused():
    with pytest.raises(BadSampleError, match="20000 x 1"):
        resize_center_crop(np.zeros((1, 20_000, 3), dtype=np.uint8), 224)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode_image(encoded(image, "JPEG", exif=exif)).shape == (6, 4, 3)


def test_one_pixel():
    assert (
        resize_center_crop(decode_image(encoded(Image.new("RGB", (1, 1), (9, 9, 9)))), 4).tolist()
        == [[[9, 9, 9]] * 4] * 4
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable"),
        (b"<html>not found</html>", "undecodable"),
        (encoded(Image.new("RGB", (64, 64)))[:60], "undecodable"),
        (encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:-900], "undecodable"),
    ],
)
def test_bytes_that_are_no_picture(data, reason):
    assert reason_of(data) == reason


def test_large_pictures_are_refused_from_their_header():
    data = encoded(Image.new("1", (30_000, 30_000)))
    assert len(data) < 1_000_000
    assert reason_of(data) == "too_large"
    assert reason_of(encoded(Image.new("1", (9000, 9000)))) == "too_large"
    with pytest.raises(BadSampleError, match="20 x 20"):
        decode_image(encoded(colour("RGB", (20, 20))), max_pixels=399)


@settings(max_examples=60, deadline=None)
@given(
    sides=st.tuples(*[st.integers(1, 200)] * 2),
    target=st.tuples(*[st.integers(1, 120)] * 2),
    strip_pixels=st.integers(1, 4000),
    seed=st.integers(0, 9),
)
def test_resizing_in_strips_has_the_same_bits(sides, target, strip_pixels, seed):
    image = np.random.default_rng(seed).integers(0, 256, (*sides, 3), dtype=np.uint8)
    whole = resize(image, *target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "STRIP_PIXELS", strip_pixels)
        assert np.array_equal(resize(image, *target), whole)


_PEAK = """
import io, re, sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from openvision.images.augment import Augment, random_crop
from openvision.images.decode import open_image
from openvision.images.preprocess import prepare

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
buffer = io.BytesIO()
Image.new(sys.argv[1], (7000, 7000)).save(buffer, sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")
before = peak()
for size in (prepare(buffer.getvalue(), 224).shape,
             random_crop(open_image(buffer.getvalue()), np.random.default_rng(0), 224, Augment()).shape):
    assert size == (224, 224, 3)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("mode", "form", "mebibytes"),
    [
        ("RGB", "JPEG", 300),
        pytest.param("RGBA", "PNG", 550, marks=pytest.mark.slow),
        pytest.param("I", "TIFF", 550, marks=pytest.mark.slow),
    ],
)
def test_49_megapixels_take_a_few_hundred_megabytes(mode, form, mebibytes):
    """147 MB are its pixels, 196 MB Pillow's own; it took up to 1.6 GB."""
    done = subprocess.run([sys.executable, "-c", _PEAK, mode, form], capture_output=True, text=True, check=True)
    assert float(done.stdout) < mebibytes

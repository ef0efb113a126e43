"""Pictures are decoded no larger than needed, and show the same."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from openvision.images import decode
from openvision.images.decode import BadSampleError, Jpeg, Pixels, decode_image, open_image
from openvision.images.preprocess import resize


def scene(height: int, width: int) -> np.ndarray:
    """A smooth picture: what a lower scale loses is not in it."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 120 * np.sin(x / 37), 127 + 120 * np.cos(y / 29), 127 + 120 * np.sin((x + y) / 53)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, form: str = "JPEG", **settings) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, form, **settings)
    return buffer.getvalue()


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(40, 500),
    width=st.integers(40, 500),
    size=st.sampled_from([16, 32, 84]),
    corner=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    share=st.floats(0.3, 0.5),
)
def test_a_crop_decoded_small_is_the_crop_decoded_whole(height, width, size, corner, share) -> None:
    data = encoded(scene(height, width), quality=95)
    box = (int(corner[0] * height), int(corner[1] * width), max(8, int(share * height)), max(8, int(share * width)))
    picture = open_image(data)
    assert isinstance(picture, Jpeg)
    small = picture.crop(box, size)
    assert min(small.shape[:2]) >= min(size, *box[2:]) - 1
    whole = Pixels(decode_image(data)).crop(box, size)
    difference = np.abs(resize(small, size, size).astype(int) - resize(whole, size, size).astype(int))
    # Half a pixel of the smaller picture at the usual slope of the scene, and the noise of the codec.
    scale = box[2] / small.shape[0]
    assert difference.mean() < 2 + 1.5 * scale


@pytest.mark.parametrize(("side", "size", "decoded"), [(512, 64, 64), (512, 84, 128), (512, 224, 256), (512, 300, 512)])
def test_the_smallest_scale_that_covers_is_taken(side, size, decoded) -> None:
    picture = open_image(encoded(scene(side, side)))
    assert picture.crop((0, 0, side, side), size).shape == (decoded, decoded, 3)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_whole_jpegs_are_what_pillow_makes_of_them(subsampling) -> None:
    data = encoded(scene(97, 151), quality=80, subsampling=subsampling)
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_grey_and_cmyk_jpegs() -> None:
    grey = decode_image(encoded(Image.fromarray(scene(40, 50)).convert("L")))
    assert grey.shape == (40, 50, 3)
    assert (grey[..., 0] == grey[..., 2]).all()
    assert decode_image(encoded(Image.fromarray(scene(40, 50)).convert("CMYK"))).shape == (40, 50, 3)


def test_a_rotation_in_the_exif_data_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = open_image(encoded(scene(40, 60), exif=exif))
    assert (picture.height, picture.width) == (60, 40)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_other_formats_are_decoded_whole(form) -> None:
    picture = open_image(encoded(scene(40, 60), form))
    assert isinstance(picture, Pixels)
    assert picture.crop((1, 2, 30, 40), 8).shape == (30, 40, 3)


def test_a_jpeg_cut_short_is_told_when_it_is_decoded() -> None:
    data = encoded(scene(200, 200), quality=95)
    picture = open_image(data[: len(data) // 2])
    with pytest.raises(BadSampleError, match="cannot be decoded") as caught:
        picture.crop((0, 0, 200, 200), 50)
    assert caught.value.reason == "undecodable"


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" + bytes(50), b"GIF89a"])
def test_bytes_that_are_no_picture(data) -> None:
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        open_image(data)


def test_too_many_pixels_are_refused_from_the_header() -> None:
    data = encoded(scene(100, 100))
    with pytest.raises(BadSampleError, match="100 x 100 pixels, more than 9999") as caught:
        open_image(data, max_pixels=9999)
    assert caught.value.reason == "too_large"


def test_formats_that_start_other_programs_are_not_opened() -> None:
    data = encoded(scene(20, 30), "EPS")
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        open_image(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "I;16", "I", "F", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_strips_give_the_pixels_of_the_whole(mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image is converted in strips; every mode, upright or turned, has the pixels of one conversion."""
    values = np.random.default_rng(3).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    if mode.startswith("I") or mode == "F":
        # The brightest pixel alone, in the last strip, says that there are 16 bits.
        gray = values[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
        gray[-1, -1] = 60_000
        image = Image.fromarray(gray)
    else:
        image = Image.fromarray(values, "RGBA").convert("RGB" if mode in ("P", "CMYK") else "RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = 7
    image.getexif()[ExifTags.Base.Orientation] = orientation
    whole = decode.to_rgb(image)
    assert whole.shape == ((37, 23, 3) if orientation == 1 else (23, 37, 3))
    monkeypatch.setattr(decode, "STRIP_PIXELS", 100)
    assert np.array_equal(decode.to_rgb(image), whole)


# What draws images, reads masks, or prints the rules for users of other libraries; a bundle's script has Pillow alone.
_OTHERS = (
    *("images/decode.py", "data/sources/", "evaluation/data/masks.py", "weights/export/card.py"),
    "weights/export/edge.py",
)


def test_images_become_pixels_in_one_place() -> None:
    """A bare `convert("RGB")` forgets orientation, transparency and depth."""
    package = Path(decode.__file__).parents[1]
    own = [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*.py"))
        if re.search(r"""Image\.open\(|\.convert\(["']RGB["']\)""", path.read_text(encoding="utf-8"))
    ]
    assert [name for name in own if not name.startswith(_OTHERS)] == []
    assert "images/decode.py" in own

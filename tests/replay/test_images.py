"""Public reports about images that were decoded wrongly, tried on every way from bytes to pixels."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from openvision.images.augment import Augment, random_crop
from openvision.images.decode import BadSampleError, Jpeg, decode_image, open_image, read_header, to_rgb_image
from openvision.images.preprocess import prepare
from openvision.inference.embed import embed, read_features
from openvision.inference.vision import VisionEncoder
from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.multimodal.benchmarks.runner import _open as open_for_benchmark
from openvision.multimodal.data.images import ImageFile, RowImage

ORIENTATION = 0x0112
# EXIF orientation -> how an upright image is stored with it.
STORED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, -1),
}


def scene() -> np.ndarray:
    """An image whose four borders differ: RGB uint8 (48, 80, 3)."""
    image = Image.new("RGB", (80, 48), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 15, 47), "red")
    draw.rectangle((16, 32, 79, 47), "green")
    return np.asarray(image)


def encoded(image: Image.Image | np.ndarray, form: str, **settings) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    picture.save(buffer, form, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {}) | settings)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def everywhere(data: bytes, folder: Path) -> dict[str, np.ndarray]:
    """Whole pixels of an encoded image by every way that the package has."""
    path = folder / "image.bin"
    path.write_bytes(data)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        row = {"image": opened}
        source = open_image(data)
        return {
            "shards": source.crop((0, 0, source.height, source.width), 10**6),
            "folders": decode_image(data),
            "Pillow images": np.asarray(to_rgb_image(opened)),
            "multimodal files": np.asarray(ImageFile(path).open()),
            "multimodal rows": np.asarray(RowImage([row], 0, "image", None).open()),
            "benchmarks": np.asarray(open_for_benchmark(path)),
        }


def assert_shows(data: bytes, upright: np.ndarray, folder: Path, tolerance: float = 3) -> None:
    for way, pixels in everywhere(data, folder).items():
        assert pixels.shape == upright.shape, way
        assert np.abs(pixels.astype(int) - upright).mean() <= tolerance, way


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format(orientation, form, tmp_path):
    """mistralai/mistral-common#330: images with EXIF orientation 3, 6 or 8 were fed sideways."""
    lossless = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "AVIF" else {}
    data = encoded(STORED[orientation](scene()), form, exif=exif(orientation), **lossless)
    assert_shows(data, scene(), tmp_path)
    assert read_header(data)[:2] == (80, 48)


@pytest.mark.parametrize("before", [0, 60_000])
def test_the_fast_path_turns_too(before):
    """sgl-project/sglang#33449: a fix for EXIF orientation was bypassed by the fast JPEG path."""
    data = encoded(np.rot90(scene()), "JPEG", exif=exif(6))
    # A segment before EXIF, as large as a thumbnail: looking at the first 4 kB alone missed it.
    data = data[:2] + b"\xff\xe2" + struct.pack(">H", before + 2) + bytes(before) + data[2:]
    crop = random_crop(
        open_image(data), np.random.default_rng(0), 16, Augment(crop_area=(1, 1), crop_aspect=(1.6, 1.7))
    )
    assert np.abs(crop[8, 1].astype(int) - (255, 0, 0)).max() < 40
    assert np.abs(crop[14, 12].astype(int) - (0, 128, 0)).max() < 40


@pytest.mark.parametrize("order", ["<", ">"])
def test_upright_exif_keeps_the_fast_path(order):
    """sgl-project/sglang#33449, the other side: a camera's EXIF that turns nothing costs no speed."""
    entries = struct.pack(order + "HHIHH", 0x0112, 3, 1, 1, 0) + struct.pack(order + "HHII", 0x0213, 4, 1, 1)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 2) + entries + bytes(4)
    source = open_image(encoded(scene(), "JPEG", exif=b"Exif\0\0" + tiff))
    assert isinstance(source, Jpeg)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_out_of_range_counts_as_none(orientation, form, tmp_path):
    """colmap/colmap#4322: an EXIF orientation of 0 ended the program."""
    assert_shows(encoded(scene(), form, exif=exif(orientation)), scene(), tmp_path, 6)


def test_a_broken_tag_costs_the_tag_not_the_image(tmp_path):
    """huggingface/datasets#7668: an XMP block that is not UTF-8 raised UnicodeDecodeError and ended the run."""
    xmp = b'<x:xmpmeta><rdf:Description dc:title="\xa8" tiff:Orientation="6"/></x:xmpmeta>'
    assert_shows(encoded(np.rot90(scene()), "JPEG", xmp=xmp), scene(), tmp_path)
    whole = exif(1).tobytes()
    for damaged in (
        whole[:9],
        whole[:6] + b"XX" + whole[8:],
        whole[:10] + b"\xff\xff\xff\x7f" + whole[14:],
        b"Exif\0\0",
    ):
        for form in ("JPEG", "PNG", "WEBP"):
            assert_shows(encoded(scene(), form, exif=damaged), scene(), tmp_path, 6)


def hidden_colours() -> Image.Image:
    """Black on transparent black: what lies under the transparency must not show."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((8, 8, 23, 23), (0, 0, 0, 255))
    return image


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "one colour", "16 bits", "half"])
def test_transparency_is_composited_on_white(kind, tmp_path):
    """vllm-project/vllm#18569: `convert("RGB")` showed the colours that transparency hides."""
    image = hidden_colours()
    if kind == "half":
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
        assert abs(int(decode_image(encoded(image, "PNG"))[0, 0, 0]) - 127) <= 1
        return
    data = {
        "RGBA": lambda: encoded(image, "PNG"),
        "LA": lambda: encoded(image.convert("LA"), "PNG"),
        "palette": lambda: encoded(palette(), "PNG", transparency=b"\0\xff"),
        "one colour": lambda: encoded(Image.new("RGB", (32, 32), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        "16 bits": lambda: encoded(Image.new("I;16", (32, 32), 300), "PNG", transparency=300),
    }[kind]()
    for way, pixels in everywhere(data, tmp_path).items():
        assert pixels[0, 0].tolist() == [255, 255, 255], way
        if kind in ("RGBA", "LA", "palette"):
            assert pixels[16, 16].tolist() == [0, 0, 0], way


def palette() -> Image.Image:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([200, 0, 0, 0, 0, 0])
    ImageDraw.Draw(image).rectangle((8, 8, 23, 23), 1)
    return image


RAMP = np.linspace(0, 1, 256 * 4).reshape(4, 256)
DEPTHS = {
    "16-bit PNG": ("PNG", (RAMP * 65535).astype(np.uint16)),
    "16-bit TIFF": ("TIFF", (RAMP * 65535).astype(np.uint16)),
    "16-bit PGM": ("PPM", (RAMP * 65535).astype(np.uint16)),
    "32-bit integers to 255": ("TIFF", (RAMP * 255).astype(np.int32)),
    "32-bit integers to 65535": ("TIFF", (RAMP * 65535).astype(np.int32)),
    "floats to 1": ("TIFF", RAMP.astype(np.float32)),
    "floats to 255": ("TIFF", (RAMP * 255).astype(np.float32)),
    "floats to 65535": ("TIFF", (RAMP * 65535).astype(np.float32)),
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_deep_ramps_stay_ramps(kind, tmp_path):
    """open-edge-platform/geti#6726: 16-bit grey was clipped to white; floats from 0 to 1 became black."""
    form, values = DEPTHS[kind]
    for way, pixels in everywhere(encoded(values, form), tmp_path).items():
        assert np.abs(pixels[..., 0] - 255 * RAMP).max() <= 1, way


@pytest.mark.parametrize("low", [-1.0, 0.0, np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_depth_that_no_file_states_is_refused(low, dtype):
    """1Konny/BEGAN-pytorch#3: values of an unknown range were clipped; they are refused, by name."""
    values = np.full((4, 4), 100_000, dtype)
    values[2, 2] = 0 if np.isnan(low) and dtype is np.int32 else low
    with pytest.raises(BadSampleError, match=r"8 or 16 bits|no numbers") as caught:
        decode_image(encoded(values, "TIFF"))
    assert caught.value.reason == "unsupported_depth"


def rgb16(key: tuple[int, int, int]) -> bytes:
    """A PNG of 16-bit RGB, three rows of one colour, of which `key` is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + 4 * struct.pack(">3H", *colour) for colour in ((65535, 0, 0), (0, 40_000, 0), key))
    head = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", struct.pack(">3H", *key)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_sixteen_bits_of_colour_with_a_transparent_one():
    """open-edge-platform/geti#6726, in colour: 16-bit RGB keeps its high bytes, its transparent colour is white."""
    pixels = decode_image(rgb16((0x1234, 0x5678, 0x9ABC)))
    assert pixels[:, 0].tolist() == [[255, 0, 0], [0, 156, 0], [255, 255, 255]]


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_has_the_colours_of_pillow(adobe, tmp_path):
    """meta-pytorch/torchcodec#1545: two decoders of one library inverted the inks of CMYK differently."""
    data = encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG")
    at = data.index(b"\xff\xee")
    assert data[at + 4 : at + 9] == b"Adobe"
    if not adobe:
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    if adobe:
        assert np.abs(expected.astype(int) - scene()).mean() < 3
    assert_shows(data, expected, tmp_path, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_of_few_pixels_is_height_width_channels(size, mode):
    """huggingface/transformers#21638: the channel axis of small images was guessed, and guessed wrongly."""
    colour = (10, 20, 30) if mode == "RGB" else 20
    pixels = prepare(encoded(Image.new(mode, size, colour), "PNG"), 8)
    assert pixels.shape == (8, 8, 3)
    assert (pixels == (colour if mode == "RGB" else (20, 20, 20))).all()


def test_a_text_chunk_that_explodes_is_one_bad_sample():
    """huggingface/nanoVLM#142: a PNG with a huge zTXt chunk ended the run; the fix raised Pillow's limit for all."""
    from PIL import PngImagePlugin

    limit = PngImagePlugin.MAX_TEXT_CHUNK
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (2 * limit), zip=True)
    with pytest.raises(BadSampleError, match="too large") as caught:
        decode_image(encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=info))
    assert caught.value.reason == "undecodable"
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK


def test_a_truncated_jpeg_is_skipped_and_the_folder_is_finished(tmp_path):
    """rom1504/clip-retrieval#257: one truncated JPEG made encoding hang for ever."""
    rng = np.random.default_rng(0)
    for number in range(4):
        data = encoded(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8), "JPEG")
        (tmp_path / f"{number}.jpg").write_bytes(data[: int(len(data) * 0.6)] if number in (1, 3) else data)
    torch.manual_seed(0)
    tower = VisionTransformer(VisionConfig(width=16, depth=1, mlp_dim=16, heads=1, patch_size=8, image_size=16), 8)
    result = embed(VisionEncoder(tower), tmp_path, tmp_path / "vectors.safetensors")
    assert result.encoded == 2
    assert [name for name, _ in result.skipped] == ["1.jpg", "3.jpg"]
    assert read_features(tmp_path / "vectors.safetensors")[0] == ["0.jpg", "2.jpg"]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(form, tmp_path):
    """mlfoundations/open_clip, data.py: which frame of an animation is read was left to chance."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    lossless = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=100, **lossless)
    assert_shows(data, np.asarray(frames[0]), tmp_path, 1)

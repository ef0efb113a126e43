"""Images keep their aspect within a budget of patches; a square is what it was."""

import io

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from openvision.images.augment import Augment, random_crop
from openvision.images.decode import BadSampleError, open_image
from openvision.images.native import NativeShapes, grid_of, pack, rows_by_shape, unpack
from openvision.images.preprocess import prepare

SHAPES = NativeShapes(patch_size=8, max_tokens=64)


def encoded(height: int, width: int, kind: str = "JPEG") -> bytes:
    # A smooth image, which survives JPEG.
    rows, columns = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    pixels = np.stack([rows + 0 * columns, columns + 0 * rows, (rows + columns) / 2], axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@given(st.floats(0.02, 50), st.integers(1, 1024))
@example(0.225, 248)  # 7 and 8 columns show as much
def test_a_grid_keeps_to_the_budget_and_turns_with_the_image(aspect, most):
    rows, columns = grid_of(aspect, most)
    assert 1 <= rows * columns <= most
    assert grid_of(1 / aspect, most) == (columns, rows) or abs(aspect - 1) < 1e-9


def test_the_grids_of_256_patches():
    assert [grid_of(aspect, 256) for aspect in (1 / 4, 1 / 2, 3 / 4, 1, 4 / 3, 2, 4)] == [
        (32, 8),
        (22, 11),
        (18, 14),
        (16, 16),
        (14, 18),
        (11, 22),
        (8, 32),
    ]
    assert all(grid_of(1, side**2) == (side, side) for side in range(1, 60))


def test_nearest_bucket_and_no_further():
    assert SHAPES.shape_of(100, 100) == (64, 64)
    assert SHAPES.shape_of(100, 400) == (32, 128)
    assert SHAPES.shape_of(430, 100) == (128, 32)
    with pytest.raises(
        BadSampleError, match="450 x 100 pixels is beyond the largest bucket, whose sides are 4 to 1"
    ) as e:
        SHAPES.shape_of(100, 450)
    assert e.value.reason == "extreme_aspect"
    with pytest.raises(BadSampleError, match="sides are 1 to 4; crop it, or train with a bucket for it"):
        SHAPES.shape_of(450, 100)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("sampling", ["original", "random_resized"])
def test_a_square_is_cropped_as_without(kind, sampling):
    image, augment = open_image(encoded(300, 300, kind)), Augment(crop_sampling=sampling)
    for seed in range(5):
        native = SHAPES.random_crop(image, np.random.default_rng(seed), augment)
        assert np.array_equal(native, random_crop(image, np.random.default_rng(seed), 64, augment))
    assert np.array_equal(SHAPES.prepare(encoded(300, 300, kind)), prepare(encoded(300, 300, kind), 64))


@pytest.mark.parametrize(
    ("height", "width", "shape"), [(100, 400, (32, 128)), (1600, 400, (128, 32)), (60, 80, (56, 72))]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_other_shapes_are_whole_and_not_squashed(height, width, shape, kind):
    whole = Augment(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    image = open_image(encoded(height, width, kind))
    for pixels in (
        SHAPES.prepare(encoded(height, width, kind)),
        SHAPES.random_crop(image, np.random.default_rng(0), whole),
    ):
        assert pixels.shape == (*shape, 3)
        # The gradients of the whole image run from one end to the other.
        assert pixels[0, :, 0].mean() < 25
        assert pixels[-1, :, 0].mean() > 230
        assert pixels[:, 0, 1].mean() < 25
        assert pixels[:, -1, 1].mean() > 230


def test_pack_and_unpack():
    shapes = [(16, 24), (8, 8), (16, 24)]
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in shapes]
    packed, written = pack(images, 400)
    assert packed.shape == (3, 3, 400)
    assert written.tolist() == [list(shape) for shape in shapes]
    groups = rows_by_shape(shapes)
    assert groups == {(8, 8): [1], (16, 24): [0, 2]}
    for shape, rows in groups.items():
        for image, row in zip(unpack(packed[rows], shape), rows, strict=True):
            assert torch.equal(image, images[row])

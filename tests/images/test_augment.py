"""Crops and colours are drawn with the original's distributions."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from openvision.images.augment import Augment, Jitter, apply_jitter, draw_jitter, random_crop, random_crop_box
from openvision.images.decode import Pixels

PLAIN = Augment(jitter_probability=0, grayscale_probability=0)


def test_crop_areas_have_the_measured_quantiles():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(rng, 300, 400, Augment()) for _ in range(20_000)])
    y, x, height, width = boxes.T
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (y + height <= 300).all()
    assert (x + width <= 400).all()
    areas = height * width / (300 * 400)
    assert areas.min() >= 0.4
    quantiles = np.quantile(areas, [0.10, 0.25, 0.50, 0.75, 0.90])
    # The specification's restatement; the original itself gave .427 .476 .556 .669 .777, a uniform area .46 to .94.
    assert np.abs(quantiles - [0.426, 0.474, 0.555, 0.656, 0.765]).max() < 0.01
    assert np.abs(quantiles - [0.427, 0.476, 0.556, 0.669, 0.777]).max() < 0.02


def test_the_whole_picture_when_nothing_fits():
    augment = Augment(crop_area=(0.99, 1.0), crop_aspect=(3.0, 3.0))
    assert random_crop_box(np.random.default_rng(0), 50, 50, augment) == (0, 0, 50, 50)


@pytest.mark.parametrize(
    ("name", "value"),
    [("crop_area", (1.0, 0.4)), ("crop_area", (0, 1)), ("crop_aspect", (-1, 1)), ("crop_aspect", (0.5, float("inf")))],
)
def test_impossible_crops_are_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        Augment(**{name: value})


def test_a_crop_is_resized():
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    assert random_crop(Pixels(image), np.random.default_rng(1), 24, Augment()).shape == (24, 24, 3)


def one_operation(operation: int, amount: float, image: torch.Tensor) -> torch.Tensor:
    """Apply one of brightness, contrast, saturation, hue by applying the others with no effect."""
    neutral = [1.0, 1.0, 1.0, 0.0]
    neutral[operation] = amount
    brightness, contrast, saturation, hue = neutral
    jitter = Jitter((0, 1, 2, 3), (brightness, contrast, saturation, hue), gray=False)
    return apply_jitter(image, [jitter])


@pytest.fixture
def image() -> torch.Tensor:
    rng = np.random.default_rng(3)
    return torch.from_numpy(rng.integers(0, 256, (1, 3, 6, 5), dtype=np.uint8))


def hsv(image: torch.Tensor, change) -> np.ndarray:
    """Reference in the standard library: change (h, s, v) of every pixel."""
    pixels = image[0].permute(1, 2, 0).reshape(-1, 3).numpy() / 255
    changed = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in pixels]
    return (np.array(changed) * 255).reshape(6, 5, 3).transpose(2, 0, 1)


@pytest.mark.parametrize("turn", [-0.08, 0.03, 0.4])
def test_hue_equals_the_standard_library(image, turn):
    expected = hsv(image, lambda h, s, v: ((h + turn) % 1, s, v))
    assert np.abs(one_operation(3, turn, image)[0].numpy() - expected).max() < 1.01


@pytest.mark.parametrize("factor", [0.68, 1.32, 5.0])
def test_saturation_equals_the_standard_library(image, factor):
    expected = hsv(image, lambda h, s, v: (h, min(1.0, s * factor), v))
    assert np.abs(one_operation(2, factor, image)[0].numpy() - expected).max() < 1.01


def test_brightness_and_contrast(image):
    values = image.float()
    brighter = one_operation(0, 1.3, image).float()
    assert (brighter - (values * 1.3).clamp(max=255)).abs().max() < 1.01
    mean = values.mean(dim=(2, 3), keepdim=True)
    flatter = one_operation(1, 0.7, image).float()
    assert (flatter - ((values - mean) * 0.7 + mean)).abs().max() < 1.01


def test_gray_and_nothing(image):
    gray = apply_jitter(image, [Jitter((), (1.3, 1.3, 1.3, 0.1), gray=True)])
    assert (gray[:, 0] == gray[:, 1]).all()
    assert (gray[:, 0] == gray[:, 2]).all()
    weights = torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    assert (gray[:, :1].float() - (image * weights).sum(1, keepdim=True)).abs().max() < 1.01
    untouched = apply_jitter(image, [Jitter((), (1.3, 1.3, 1.3, 0.1), gray=False)])
    assert (untouched.int() - image.int()).abs().max() <= 1


def test_frequencies_and_ranges():
    rng = np.random.default_rng(0)
    drawn = [draw_jitter(rng, Augment()) for _ in range(4000)]
    assert abs(np.mean([bool(jitter.order) for jitter in drawn]) - 0.8) < 0.03
    assert abs(np.mean([jitter.gray for jitter in drawn]) - 0.2) < 0.03
    amounts = np.array([jitter.amounts for jitter in drawn])
    assert 0.68 <= amounts[:, :3].min() < 0.69
    assert 1.31 < amounts[:, :3].max() <= 1.32
    assert 0.079 < np.abs(amounts[:, 3]).max() <= 0.08
    assert len({jitter.order for jitter in drawn}) == 25
    assert not any(draw_jitter(rng, PLAIN).order for _ in range(50))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([5, 15, 31, 48, 72]), threads=st.sampled_from([1, 2, 4]))
def test_a_picture_depends_neither_on_its_batch_nor_on_threads(seed, size, threads):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (6, 3, size, size), dtype=np.uint8))
    jitters = [draw_jitter(rng, Augment(jitter_probability=0.9)) for _ in range(6)]
    together = apply_jitter(images, jitters)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        alone = torch.cat([apply_jitter(images[row : row + 1], jitters[row : row + 1]) for row in range(6)])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)

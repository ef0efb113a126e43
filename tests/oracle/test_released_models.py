"""Every released layout, with random weights, here and in stock open_clip: the same features.

Ti and S in full; the larger ones at full width and two blocks deep, in full in `make test-slow`.
"""

# pyright: reportMissingImports=false

import json
import re
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from openvision.models.layers import unit
from openvision.models.openvision import OpenVisionConfig
from openvision.weights.load import load_checkpoint
from openvision.weights.open_clip import CONFIG_FILE, config_to_open_clip
from openvision.weights.registry import available_models, released
from tests.released import random_state, released_shapes

# Version 1 alone: open_clip has neither of the others.
WHOLE = [name for name in available_models() if name.startswith("openvision-")]
SMALL = [name for name in WHOLE if any(f"-{size}-" in name for size in ("tiny", "small", "base"))]
# 784 patches of 8 px take half a minute, 2,304 a minute.
_LONG = re.compile("base|patch8-384")
LARGE = [name for name in WHOLE if name not in SMALL or "-base-" in name]


def shape_of(name: str) -> OpenVisionConfig:
    full = released(name).full
    assert full is not None
    return OpenVisionConfig(full.embed_dim, full.vision, full.text)


def shallow(config: OpenVisionConfig) -> OpenVisionConfig:
    return replace(config, vision=replace(config.vision, depth=2), text=replace(config.text, depth=2))


def small_vocabulary(config: OpenVisionConfig) -> OpenVisionConfig:
    return replace(config, text=replace(config.text, vocab_size=500))


def features_agree(config: OpenVisionConfig, folder) -> None:
    save_file(random_state(released_shapes(config)), folder / "open_clip_model.safetensors")
    (folder / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(config)))
    ours = load_checkpoint(folder).model
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    assert ours is not None
    assert ours.config == config
    side = config.vision.image_size
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, config.text.vocab_size, (2, 80), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        image = (ours.encode_image(images) - unit(theirs.encode_image(images))).abs().max().item()
        text = (ours.encode_text(ids) - unit(theirs.encode_text(ids))).abs().max().item()
        scale = (ours.logit_scale.exp() - theirs.logit_scale.exp()).abs().item()
    assert image < 1e-5
    assert text < 1e-5
    assert scale == 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if _LONG.search(name) else []) for name in SMALL]
)
def test_small_models_in_full(name, tmp_path) -> None:
    features_agree(small_vocabulary(shape_of(name)), tmp_path)


@pytest.mark.parametrize("name", LARGE)
def test_large_models_two_blocks_deep(name, tmp_path) -> None:
    features_agree(small_vocabulary(shallow(shape_of(name))), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvision-vit-large-patch14-224", "openvision-vit-so400m-patch14-384"])
def test_large_models_in_full(name, tmp_path) -> None:
    features_agree(shape_of(name), tmp_path)


@pytest.mark.slow
def test_the_largest_model_in_full(tmp_path) -> None:
    features_agree(shape_of("openvision-vit-huge-patch14-224"), tmp_path)

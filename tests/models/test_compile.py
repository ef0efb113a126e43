"""Blocks, towers, decoders and losses compile as one graph each, and another resolution recompiles them once.

The backend "aot_eager" traces forward and backward pass as the real compiler does and runs them as they are, on any
machine. A second resolution makes the shapes dynamic.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from openvision.models.decoders.autoregressive import (
    AutoregressiveCaptionDecoder,
    AutoregressiveDecoderConfig,
)
from openvision.models.decoders.parallel import DecoderBlock, DecoderConfig, ParallelCaptionDecoder
from openvision.models.genlip import GenLip, GenLipConfig, GenLipTextConfig, GenLipVisionConfig
from openvision.models.layers import Block
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig, TextTransformer
from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.objectives import caption
from openvision.objectives.contrastive import contrastive_losses
from openvision.runtime import autocast

WIDTH, VOCABULARY, QUERIES = 32, 100, 12
SHAPE: dict[str, Any] = {"width": WIDTH, "depth": 2, "mlp_dim": 48, "heads": 2}
# Where every block is entered the same way; two where the last one computes other rows.
SHALLOW: dict[str, Any] = {**SHAPE, "depth": 1}
RESOLUTIONS = (32, 48)
Case = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_once(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Callable[[int], Case],
    precision: torch.dtype = torch.float32,
    graphs: int = 2,
    resolutions: tuple[int, ...] = RESOLUTIONS,
) -> None:
    """Forward and backward pass at all resolutions in one graph without breaks, compiled at most `graphs` times."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for resolution in resolutions:
        case = inputs(resolution)
        with autocast("cpu", precision):
            outputs = [function(*case), compiled(*case)]
        plain, found = (torch.cat([x.flatten() for x in _tuple(each)]) for each in outputs)
        torch.testing.assert_close(found, plain, atol=2e-2 if precision == torch.bfloat16 else 1e-5, rtol=1e-4)
        found.float().sum().backward()
    assert counters["stats"]["unique_graphs"] <= graphs
    assert not counters["graph_break"]


def _tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def patches(resolution: int) -> int:
    return (resolution // 8) ** 2


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH)


def images(resolution: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, resolution, resolution), dtype=torch.uint8)


def some(count: int) -> Tensor:
    """Numbers of a quarter of `count` things, for two samples."""
    return torch.randint(0, count, (2, count // 4))


def ids(length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length))


BLOCKS: dict[str, tuple[type[nn.Module], Callable[[int], Case]]] = {
    "forward": (Block, lambda r: (tokens(1 + patches(r)),)),
    "forward_rows": (Block, lambda r: (tokens(1 + patches(r)), some(patches(r)))),
    "forward_prefix": (
        DecoderBlock,
        lambda r: (tokens(patches(r)), tokens(QUERIES)),
    ),
    "forward_queries": (
        DecoderBlock,
        lambda r: (tokens(patches(r)), tokens(QUERIES)),
    ),
}


@pytest.mark.parametrize(
    ("entry", "precision"),
    [
        # As the vision tower enters it, below, and the parallel decoder.
        pytest.param("forward", torch.float32, marks=pytest.mark.slow),
        ("forward_rows", torch.float32),
        pytest.param("forward_queries", torch.float32, marks=pytest.mark.slow),
        ("forward_prefix", torch.bfloat16),
    ],
)
def test_every_way_into_a_block(entry, precision):
    kind, inputs = BLOCKS[entry]
    block = kind(WIDTH, 2, 48, "tanh") if kind is Block else kind(WIDTH, 2, 48)

    def in_precision(resolution: int) -> Case:
        return tuple(x.to(precision) if x.is_floating_point() else x for x in inputs(resolution))

    # The second graph serves all resolutions that follow.
    compiled_once(getattr(block, entry), in_precision, precision, resolutions=(*RESOLUTIONS, 64))


def test_a_block_over_trimmed_texts():
    """Groups of similar length have any length: the second graph serves all that follow."""

    def inputs(length: int) -> Case:
        return tokens(length, batch=4), torch.arange(length) < torch.tensor([[3], [length], [4], [length - 1]])

    compiled_once(Block(WIDTH, 2, 48, "tanh").forward, inputs, resolutions=(7, 12, 24, 9, 40))


# Trimmed texts, above, have as many lengths.
@pytest.mark.slow
def test_a_block_over_native_shapes():
    """Groups of any number of images and patches: a third graph for images that are alone in their shape."""
    shapes = ((3, 17), (5, 13), (2, 16), (7, 17), (1, 17), (1, 12), (6, 12))
    compiled_once(
        Block(WIDTH, 2, 48, "none").forward,
        lambda number: (tokens(shapes[number][1], batch=shapes[number][0]),),
        graphs=3,
        resolutions=tuple(range(len(shapes))),
    )


@pytest.mark.slow
def test_a_block_with_stochastic_depth():
    block = Block(WIDTH, 2, 48, "none")

    def inputs(resolution: int) -> Case:
        # New factors for every step.
        block.branch_scale = torch.rand(2, 2)
        return BLOCKS["forward"][1](resolution)

    compiled_once(block.forward, inputs)


def test_the_vision_tower():
    tower = VisionTransformer(VisionConfig(**SHALLOW, patch_size=8, image_size=32), 16)
    compiled_once(tower.encode_image, lambda r: (images(r),))


# Its block is compiled above (forward_rows).
@pytest.mark.slow
def test_the_vision_tower_where_a_share_of_the_patches_is_read():
    tower = VisionTransformer(VisionConfig(**SHAPE, patch_size=8, image_size=32), None)
    compiled_once(tower.patch_tokens, lambda r: (images(r), some(patches(r))))


@pytest.mark.parametrize("token_rows", [0, 1])
def test_the_text_tower(token_rows):
    tower = TextTransformer(TextConfig(**SHAPE, vocab_size=VOCABULARY, context_length=16), 16)
    # A text has the same length at every resolution.
    compiled_once(lambda x: tower.forward_features(x, token_rows).pooled, lambda _: (ids(16),), graphs=1)


def test_the_parallel_caption_decoder():
    decoder = ParallelCaptionDecoder(DecoderConfig(**SHALLOW, vocab_size=VOCABULARY, caption_length=12), WIDTH, WIDTH)
    compiled_once(decoder, lambda r: (tokens(patches(r)), tokens(15)))


@pytest.mark.slow
def test_a_whole_model():
    """As `benchmarks/train_gpu.py` compiles it beside blocks; captions have fixed lengths, as on an accelerator."""
    text, decoder = TextConfig(**SHALLOW, vocab_size=VOCABULARY, context_length=16), DecoderConfig(**SHALLOW)
    decoder = replace(decoder, vocab_size=VOCABULARY, caption_length=12)
    model = OpenVision(OpenVisionConfig(16, VisionConfig(**SHALLOW, patch_size=8, image_size=32), text, decoder))

    def outputs(*case: Tensor) -> tuple[Tensor, ...]:
        output = model(*case)
        assert output.caption_states is not None
        return output.image_embeds, output.text_embeds, output.caption_states

    compiled_once(outputs, lambda r: (images(r), ids(16), ids(16)))


@pytest.mark.slow
def test_one_transformer():
    """With fixed lengths of captions, as on an accelerator; the text stands behind another grid at every resolution."""
    vision = GenLipVisionConfig(**SHAPE, patch_size=8, image_size=32)
    model = GenLip(GenLipConfig(vision, GenLipTextConfig(24, VOCABULARY, 12)))
    compiled_once(model, lambda r: (images(r), ids(12)))


def test_the_autoregressive_caption_decoder():
    config = AutoregressiveDecoderConfig(
        **SHALLOW, vocab_size=VOCABULARY, caption_length=12, text_positions="sincos", image_attention="causal"
    )
    compiled_once(AutoregressiveCaptionDecoder(config, WIDTH), lambda r: (tokens(patches(r) // 3), ids(12)))


@pytest.mark.parametrize("chunk", [2**20, 40], ids=["plain", "chunked"])
def test_the_contrastive_loss(chunk):
    def inputs(_: int) -> Case:
        unit = nn.functional.normalize(torch.randn(3, 8, 16), dim=-1).requires_grad_()
        return unit[0], unit[1:], torch.tensor(10.0, requires_grad=True)

    # The batch is the same at every resolution.
    compiled_once(lambda *case: contrastive_losses(*case, chunk=chunk), inputs, graphs=1)


def test_the_caption_loss():
    """What runs on the device; which tokens are targets is found on the CPU, before."""
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)

    def inputs(_: int) -> Case:
        counts = (torch.arange(20) < 17).float()
        return torch.randn(20, WIDTH, requires_grad=True), weight, torch.randint(0, VOCABULARY, (20,)), counts

    compiled_once(lambda *case: caption._LinearCrossEntropy.apply(*case, 8), inputs, graphs=1)

"""Cost of a stage: FLOPs of encoder and language model for one sample, and hours on given devices.

A multiply-add is two FLOPs; only matrix products count, without recomputation by gradient checkpointing. The language
model costs its parameters, without input and output embeddings (embeddings are looked up, logits computed for answers
only), times tokens; attention scores, a few percent at these lengths, and the projector are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from openvision.hardware import Device
from openvision.models.flops import vision_flops
from openvision.models.vision import VisionConfig
from openvision.multimodal.model.geometry import Geometry
from openvision.multimodal.recipe import VlmStage

# Cost of a step in forward passes: a trained module computes gradients of inputs and weights, a frozen one before which
# the projector is trained those of inputs.
_TRAINED, _PASSED_ON, _FROZEN = 3, 2, 1


@dataclass(frozen=True)
class SampleCost:
    """Cost of one sample in training."""

    encoder: float
    """FLOPs."""
    llm: float
    """FLOPs."""
    visual_tokens: int
    text_tokens: int

    @property
    def total(self) -> float:
        """FLOPs of encoder and language model."""
        return self.encoder + self.llm

    @property
    def cached_speedup(self) -> float:
        """Speed-up of a step by cached features, by FLOPs alone; infinite without the language model."""
        return self.total / self.llm if self.llm else float("inf")


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage."""

    stage: VlmStage
    samples: int
    sample: SampleCost
    hours: tuple[float, float]
    """On all devices, at the highest and lowest utilisation assumed for the device."""


def sample_cost(
    stage: VlmStage, vision: VisionConfig, geometry: Geometry, llm_parameters: float, text_tokens: int
) -> SampleCost:
    """Cost of a sample with one image and `text_tokens` tokens of text; for anyres the image fills a 2 x 2 grid.

    `llm_parameters` counts the language model without input and output embeddings.
    """
    rates = stage.learning_rate
    side = geometry.image_size * (2 if geometry.pinpoints else 1)
    visual = geometry.tokens(side, side)
    # A square image of native shapes stands for all: every shape has about as many patches.
    read = vision.image_size if geometry.native is None else geometry.native.shape_of(1, 1)[0]
    encoder = vision_flops(vision, read, None) * geometry.squares(side, side)
    # The objective "words" does not run the language model.
    llm = 2 * llm_parameters * (visual + text_tokens) if stage.objective == "answers" else 0.0
    trains_llm = rates.llm is not None and stage.lora is None
    # The last block runs, but no gradient flows through it: the projector reads the layer before.
    backward = (_TRAINED - _FROZEN) * (vision.depth - 1) / vision.depth if rates.encoder is not None else 0
    return SampleCost(
        encoder * (_FROZEN + backward),
        llm * (_TRAINED if trains_llm else _PASSED_ON),
        visual,
        text_tokens,
    )


def plan_stages(
    stages: Sequence[VlmStage],
    vision: VisionConfig,
    geometry: Geometry,
    llm_parameters: float,
    samples: Sequence[int],
    text_tokens: int,
    device: Device,
    devices: int,
) -> list[StageCost]:
    """Cost of every stage; `samples` are the sizes of the stages' data sets."""
    costs = []
    for stage, size in zip(stages, samples, strict=True):
        sample = sample_cost(stage, vision, geometry, llm_parameters, text_tokens)
        count = stage.samples or size
        seconds = sample.total * count / (device.peak_flops * devices)
        low, high = device.mfu
        costs.append(StageCost(stage, count, sample, (seconds / high / 3600, seconds / low / 3600)))
    return costs

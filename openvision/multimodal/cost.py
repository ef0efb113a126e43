"""What a stage costs: operations of encoder and language model for one sample, hours on given devices.

Two operations a multiply-add, matrix products only; recomputation by gradient checkpointing is not counted. The
language model is counted by its parameters without the tables of words (embeddings are looked up, logits computed for
answers only) times tokens, which leaves out the products of attention scores: a few percent at these lengths. The
projector is small beside both and left out.
"""

from dataclasses import dataclass

from openvision.hardware import Device
from openvision.models.flops import vision_flops
from openvision.models.vision import VisionConfig
from openvision.multimodal.model.geometry import Geometry
from openvision.multimodal.recipe import Stage, VlmRecipe

# Products of a step for each of forward: a trained module needs gradients of inputs and weights, one that only passes
# the projector's gradient on needs those of inputs.
_TRAINED, _PASSED_ON, _FROZEN = 3, 2, 1


@dataclass(frozen=True)
class Work:
    """Of one sample."""

    encoder: float
    """Operations."""
    llm: float
    visual_tokens: int
    text_tokens: int

    @property
    def total(self) -> float:
        """Operations of a step, for one sample."""
        return self.encoder + self.llm

    @property
    def cached_speedup(self) -> float:
        """How many times as fast a step is without the encoder, when operations decide; infinite without the LLM."""
        return self.total / self.llm if self.llm else float("inf")


@dataclass(frozen=True)
class StageCost:
    """Of one stage."""

    stage: Stage
    samples: int
    work: Work
    hours: tuple[float, float]
    """On all devices together, at the device's highest and lowest assumed utilisation."""


def stage_work(stage: Stage, vision: VisionConfig, geometry: Geometry, llm_parameters: float, text_tokens: int) -> Work:
    """Operations of a stage for a sample with one picture; anyres pictures are taken as filling a 2 x 2 grid."""
    rates = stage.learning_rate
    side = geometry.image_size * (2 if geometry.pinpoints else 1)
    visual = geometry.tokens(side, side)
    encoder = vision_flops(vision, vision.image_size, None) * geometry.squares(side, side)
    # Words are learnt in front of the language model, which is not run.
    llm = 2 * llm_parameters * (visual + text_tokens) if stage.objective == "answers" else 0.0
    trains_llm = rates.llm is not None and stage.lora is None
    # The last block is run, but behind the layer that is read: nothing comes back through it.
    backward = (_TRAINED - _FROZEN) * (vision.depth - 1) / vision.depth if rates.encoder is not None else 0
    return Work(
        encoder * (_FROZEN + backward),
        llm * (_TRAINED if trains_llm else _PASSED_ON),
        visual,
        text_tokens,
    )


def plan_stages(
    recipe: VlmRecipe,
    vision: VisionConfig,
    geometry: Geometry,
    llm_parameters: float,
    samples: list[int],
    text_tokens: int,
    device: Device,
    devices: int,
) -> list[StageCost]:
    """Cost of every stage; `samples` are the sizes of the data sets, in the stages' order."""
    costs = []
    for stage, size in zip(recipe.stages, samples, strict=True):
        work = stage_work(stage, vision, geometry, llm_parameters, text_tokens)
        count = stage.samples or size
        seconds = work.total * count / (device.peak_flops * devices)
        low, high = device.mfu
        costs.append(StageCost(stage, count, work, (seconds / high / 3600, seconds / low / 3600)))
    return costs

"""The plan of one stage: assumptions, layouts that fit, time, memory and cost."""

from dataclasses import dataclass

from openvision.errors import OpenVisionError
from openvision.hardware import Device, Range
from openvision.models.flops import TowerFlops
from openvision.planning.cost import (
    DATASET_SAMPLES,
    Cost,
    StepTime,
    Stretch,
)
from openvision.planning.memory import (
    LossMemory,
    Setting,
)
from openvision.recipe.sections import Stage

CAPTION_TOKENS = 60.0
"""Mean target tokens of a caption: captions of Recap-DataComp-1B have 49 words on average."""


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a plan; ranges are lowest and highest."""

    device: Device
    devices: int
    mfu: Range
    """Utilisation of forward and backward; update and exposed communication come on top."""
    price: Range
    caption_tokens: float = CAPTION_TOKENS
    dataset_samples: int = DATASET_SAMPLES

    def __post_init__(self) -> None:
        for name, (low, high) in (("mfu", self.mfu), ("price", self.price)):
            if not 0 <= low <= high:
                raise OpenVisionError(f"{name} {low}-{high} is not a range; give the lower value first, e.g. 0.3-0.45")
        if not 0 < self.mfu[0] <= self.mfu[1] <= 1:
            raise OpenVisionError(f"mfu {self.mfu[0]}-{self.mfu[1]} must be above 0 and at most 1, e.g. 0.3-0.45")


@dataclass(frozen=True)
class Fit:
    """One layout of a stage on a device, and the largest micro-batch that fits."""

    setting: Setting
    state: float
    """Bytes of parameters, gradients, moments and copies."""
    per_sample: Range
    """Bytes of activations a sample."""
    micro_batch: int
    """Largest micro-batch that fits by the high estimate; 0 when none does."""
    hopeful: int
    """Largest micro-batch that fits by the low estimate."""
    parts: int
    """Micro-batches of the local batch."""
    peak: Range
    """Bytes at `micro_batch`, or at one sample when that does not fit."""
    stretch: Stretch


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    stage: Stage
    local_batch: int
    patches: int
    towers: tuple[TowerFlops, ...]
    contrastive: int
    """Forward operations of the contrastive logits of a sample, not counted in MFU."""
    losses: LossMemory
    fits: tuple[Fit, ...]
    chosen: Fit | None
    """The layout of the run; None when none fits in all stages, and then times ignore memory."""
    time: StepTime
    cost: Cost
    mfu: Range
    """MFU of the whole step."""
    images_per_second: Range
    """Throughput of all devices together."""
    decode_cores: Range
    """Processor cores that decoding takes at `images_per_second`, all devices together."""
    terabytes_read: Range

    @property
    def training(self) -> int:
        """Operations of one training sample."""
        return sum(tower.training for tower in self.towers)

    @property
    def forward(self) -> int:
        """Operations of one forward pass."""
        return sum(tower.forward for tower in self.towers)

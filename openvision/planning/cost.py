"""Time, energy, money and communication of a stage, from its FLOPs and a device; every range is an assumption."""

from dataclasses import dataclass

from openvision.hardware import Device, Range
from openvision.models.flops import TowerFlops
from openvision.models.openvision2 import ModelConfig
from openvision.models.openvision3 import OpenVision3Config
from openvision.planning.memory import FLOAT, Checkpointing
from openvision.planning.parameters import Parameters

ENERGY_OF_LIMIT: Range = (0.8, 1.9)
"""Energy over board limit x hours: a board at 80 % of its limit and nothing else, to a board at its limit with 45 % for
its host on top and 1.3 for cooling."""
OPTIMIZER_BYTES = 26
"""Memory traffic of an update a parameter: parameter, moments and gradient read, all but the gradient written (bf16
first moment), rounded up for the gradient being cleared."""
BACKWARD_SHARE = 2 / 3
"""Fraction of compute that communication of gradients can overlap."""

SAMPLE_KILOBYTES: Range = (30, 100)
"""An image of at most 512 px as JPEG with its texts, on disk."""
DATASET_SAMPLES = 1_240_000_000
"""Rows of Recap-DataComp-1B."""

DECODED_PER_CORE: dict[int, float] = {84: 1110, 224: 563}
"""Images a second of one core, by resolution: JPEGs of 512 px and 70 kB decoded at reduced scale, cropped, resized."""
LOADER_OVERHEAD: Range = (1.6, 2.3)
"""Time of a sample in the whole loader over that: without and with colour jitter (benchmarks/results/data.md)."""


@dataclass(frozen=True)
class Stretch:
    """How much longer a step takes because of recomputation."""

    checkpointing: float
    accumulation: float

    @property
    def factor(self) -> float:
        """Time relative to a step without recomputation."""
        return 1 + self.checkpointing + self.accumulation


def stretch(towers: tuple[TowerFlops, ...], config: ModelConfig, checkpointing: Checkpointing, parts: int) -> Stretch:
    """Recomputation: all blocks under full checkpointing, both towers once more under gradient caching."""
    forward = {tower.name: tower.forward for tower in towers}
    training = sum(tower.training for tower in towers)
    # What is not trained is computed once: frozen and averaged towers, teachers, OpenVision 3's autoencoder.
    frozen = {tower.name for tower in towers if tower.frozen}
    blocks = sum(flops for name, flops in forward.items() if name not in {"vocabulary", "decoding"} | frozen)
    embedded = forward["vision"] + forward["text"] + forward.get("encoding", 0) if config.text is not None else 0
    decoded = 0
    if isinstance(config, OpenVision3Config) and config.reconstruction.decoded_at_once is not None:
        decoded = forward["decoding"]
    return Stretch(
        checkpointing=((blocks if checkpointing == "full" else 0) + decoded) / training,
        accumulation=embedded / training if parts > 1 else 0.0,
    )


@dataclass(frozen=True)
class Cost:
    """What a number of device-hours costs."""

    hours: Range
    """Wall-clock."""
    device_hours: Range
    kilowatt_hours: Range
    dollars: Range

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Cost(*((a[0] + b[0], a[1] + b[1]) for a, b in pairs))


def cost(hours: Range, device: Device, devices: int, price: Range) -> Cost:
    """Cost of `hours` on `devices` devices at `price` US dollars a device-hour."""
    low, high = hours[0] * devices, hours[1] * devices
    board = device.watts / 1000
    return Cost(
        hours=hours,
        device_hours=(low, high),
        kilowatt_hours=(low * board * ENERGY_OF_LIMIT[0], high * board * ENERGY_OF_LIMIT[1]),
        dollars=(low * price[0], high * price[1]),
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they are spent on."""

    compute: Range
    """Forward and backward at the highest and the lowest utilisation, recomputation included."""
    gradients: float
    """Communication of gradients and sharded weights at line rate; the backward pass overlaps it, except when replicas
    run micro-batches and send gradients afterwards."""
    features: float
    """Embeddings gathered from all devices at line rate, overlapped with nothing."""
    optimizer: float
    """Memory traffic of the update, overlapped with nothing."""
    hideable: float = BACKWARD_SHARE
    """Fraction of compute that gradients can overlap."""

    @property
    def exposed(self) -> Range:
        """Seconds added to compute, at the highest and the lowest utilisation."""
        rest = self.features + self.optimizer
        hidden = [self.hideable * seconds for seconds in self.compute]
        return rest + max(0.0, self.gradients - hidden[0]), rest + max(0.0, self.gradients - hidden[1])

    @property
    def total(self) -> Range:
        """The whole step."""
        return self.compute[0] + self.exposed[0], self.compute[1] + self.exposed[1]

    @property
    def limit(self) -> str:
        """What takes most of the fastest step: "compute", "network" or "memory bandwidth"."""
        network = self.features + max(0.0, self.gradients - self.hideable * self.compute[0])
        shares = {"compute": self.compute[0], "network": network, "memory bandwidth": self.optimizer}
        return max(shares, key=lambda name: shares[name])


def step_time(
    config: ModelConfig,
    parameters: Parameters,
    device: Device,
    devices: int,
    mfu: Range,
    local_batch: int,
    training: float,
    texts: int,
    sharded: bool,
    parts: int = 1,
) -> StepTime:
    """Seconds of a step of `local_batch` samples on each device, `training` operations a sample with recomputation."""
    work = local_batch * training / device.peak_flops
    gradients = features = 0.0
    if devices > 1:
        # All in float32. Replicas: one all-reduce. Shards: every micro-batch gathers weights twice and reduces
        # gradients once, and gathers weights once more to embed.
        travels = FLOAT * (3 * parts + (parts if parts > 1 else 0)) if sharded else 2 * FLOAT
        gradients = travels * parameters.total / line_rate(device, devices)
        if config.embed_dim is not None:
            features = 2 * FLOAT * texts * config.embed_dim * local_batch * devices / line_rate(device, devices)
    shards = devices if sharded else 1
    optimizer = OPTIMIZER_BYTES * parameters.total / shards / device.bandwidth
    hideable = BACKWARD_SHARE if sharded or parts == 1 else 0.0
    return StepTime((work / mfu[1], work / mfu[0]), gradients, features, optimizer, hideable)


def line_rate(device: Device, devices: int) -> float:
    """Bytes a second from every device to all others: the slower of host link and network."""
    return device.link if devices <= device.per_node else min(device.link, device.network)


def decode_rate(resolution: int) -> float:
    """Images a second that one core decodes, between and beyond the measured resolutions by pixels."""
    (small, fast), (large, slow) = sorted(DECODED_PER_CORE.items())
    seconds = 1 / fast + (resolution**2 - small**2) / (large**2 - small**2) * (1 / slow - 1 / fast)
    return 1 / max(seconds, 0.5 / fast)

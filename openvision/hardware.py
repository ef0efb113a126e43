"""Devices as their makers describe them, and the one definition of model FLOPs utilisation (MFU).

- MFU = model FLOPs a second / dense bf16 peak of all devices.
- Model FLOPs: matrix products only, two operations a multiply-add, no recomputation, of causal attention the masked
  half not counted, and nothing for a gradient that nobody needs (that of the pixels): `openvision.models.flops`.
- Peaks are dense, bf16 products with fp32 sums, from the makers' data sheets; the CPU's is what its best matrix product
  reached. Nobody reaches a peak: the MFU ranges below are assumptions, printed with every plan.
"""

from dataclasses import dataclass

from openvision.errors import OpenVisionError

Range = tuple[float, float]
"""Lowest and highest plausible value."""

GIB = 2**30
PRICES_ASSUMED = "2026-11"
"""When the prices below were assumed; they are orders of magnitude for rented devices, not offers."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or one whole CPU machine, and its share of the host around it."""

    name: str
    peak_flops: float
    """Dense bf16 operations a second."""
    memory: float
    """Bytes, as its driver reports them."""
    bandwidth: float
    """Bytes a second to its own memory."""
    watts: float
    """Power limit of the board, or of the processor."""
    price: Range
    """US dollars an hour, rented, host included."""
    mfu: Range
    """Assumed utilisation of a tuned run; nothing here was measured on a GPU of ours."""
    per_node: int
    """Devices in a host."""
    link: float
    """Bytes a second and direction between devices of a host."""
    network: float
    """Bytes a second and direction out of a host, all its network cards together."""
    host_cores: int
    """Processor cores that decode for one device."""
    source: str
    """Where peak, memory, bandwidth and power were read."""
    gpu: bool = True


DEVICES: dict[str, Device] = {
    "h100": Device(
        "H100 SXM 80 GB",
        peak_flops=989e12,
        memory=79 * GIB,
        bandwidth=3.35e12,
        watts=700,
        price=(2.0, 4.0),
        mfu=(0.25, 0.45),
        per_node=8,
        link=450e9,
        network=400e9,
        host_cores=14,
        source="NVIDIA H100 data sheet",
    ),
    "h200": Device(
        "H200 SXM 141 GB",
        peak_flops=989e12,
        memory=140 * GIB,
        bandwidth=4.8e12,
        watts=700,
        price=(2.5, 5.0),
        mfu=(0.25, 0.45),
        per_node=8,
        link=450e9,
        network=400e9,
        host_cores=14,
        source="NVIDIA H200 data sheet",
    ),
    "a100": Device(
        "A100 SXM 80 GB",
        peak_flops=312e12,
        memory=79 * GIB,
        bandwidth=2.039e12,
        watts=400,
        price=(1.0, 2.2),
        mfu=(0.30, 0.50),
        per_node=8,
        link=300e9,
        network=200e9,
        host_cores=14,
        source="NVIDIA A100 data sheet",
    ),
    "4090": Device(
        "GeForce RTX 4090 24 GB",
        peak_flops=165e12,
        memory=23.5 * GIB,
        bandwidth=1.008e12,
        watts=450,
        price=(0.3, 0.8),
        mfu=(0.30, 0.55),
        per_node=8,
        link=25e9,
        network=12.5e9,
        host_cores=8,
        source="NVIDIA Ada architecture paper, bf16 with fp32 sums",
    ),
    "cpu": Device(
        "two cores with AVX-512 bf16",
        peak_flops=0.4e12,
        memory=16 * GIB,
        bandwidth=40e9,
        watts=30,
        price=(0.04, 0.10),
        mfu=(0.15, 0.45),
        per_node=1,
        link=1.25e9,
        network=1.25e9,
        host_cores=2,
        source="best bf16 matrix product measured on two cores of an AMD EPYC",
        gpu=False,
    ),
}


def device_named(name: str) -> Device:
    """The device of that name; raises OpenVisionError for an unknown one."""
    if name not in DEVICES:
        raise OpenVisionError(f"device {name!r} is not known; choose one of {', '.join(DEVICES)}")
    return DEVICES[name]


def model_flops_utilisation(flops_per_sample: float, samples_per_second: float, peak_flops: float) -> float:
    """MFU, a share of 1.

    Args:
        flops_per_sample: training operations of a sample, as `openvision.models.flops.training_flops` counts them.
        samples_per_second: of all devices together.
        peak_flops: dense bf16 operations a second of all devices together.
    """
    return flops_per_sample * samples_per_second / peak_flops

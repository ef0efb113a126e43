"""Devices with their data-sheet numbers, and the definition of model FLOPs utilisation (MFU).

- MFU = model FLOP/s / dense bf16 peak of all devices.
- Model FLOPs (`openvision.models.flops`): matrix products only, two FLOPs per multiply-add, no recomputation, without
  the masked half of causal attention and without the unused gradient of the pixels.
- Peaks are dense, bf16 products with fp32 accumulation, from data sheets; the CPU's was measured. The MFU ranges are
  assumptions, printed with every plan, but for the H200's: it was measured.
"""

from dataclasses import dataclass

from openvision.errors import OpenVisionError

Range = tuple[float, float]
"""Lowest and highest plausible value."""

GIB = 2**30
PRICES_ASSUMED = "2026-11"
"""Date of the assumed prices below: orders of magnitude for rented devices, not offers."""


@dataclass(frozen=True)
class Device:
    """One accelerator with its share of the host, or one CPU machine."""

    name: str
    peak_flops: float
    """Dense bf16 peak, FLOP/s."""
    memory: float
    """Device memory as the driver reports it, bytes."""
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    watts: float
    """Power limit of the board or the processor, W."""
    price: Range
    """Rental price with host, US dollars per hour."""
    mfu: Range
    """MFU of a tuned run: assumed, unless `measured` says otherwise."""
    per_node: int
    """Devices per host."""
    link: float
    """Bandwidth between devices of a host, bytes/s per direction."""
    network: float
    """Network bandwidth of a host, bytes/s per direction."""
    host_cores: int
    """CPU cores per device, for decoding."""
    source: str
    """Source of peak, memory, bandwidth and power."""
    gpu: bool = True
    measured: str = ""
    """What `mfu` was measured on; "" where it is an assumption."""


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
        mfu=(0.38, 0.47),
        per_node=8,
        link=450e9,
        network=400e9,
        host_cores=14,
        source="NVIDIA H200 data sheet",
        measured="L/14 of both versions and plain CLIP, blocks compiled, 2026-11-27 (benchmarks/results/train_gpu.md)",
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
    """Device by name; raises OpenVisionError for an unknown one."""
    if name not in DEVICES:
        raise OpenVisionError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)}")
    return DEVICES[name]


def model_flops_utilisation(flops_per_sample: float, samples_per_second: float, peak_flops: float) -> float:
    """MFU, 0 to 1.

    Args:
        flops_per_sample: training FLOPs per sample, from `openvision.models.flops.training_flops`.
        samples_per_second: throughput of all devices together.
        peak_flops: dense bf16 peak of all devices together, FLOP/s.
    """
    return flops_per_sample * samples_per_second / peak_flops

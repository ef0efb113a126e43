"""What a report shows of OpenVision 3 beside version 1's sections: reconstruction in numbers, and generated images.

A generator is measured where it is known (generation/nearness.py); the page gets numbers and images.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openvision.evaluation.report.gallery import Album
from openvision.evaluation.report.parts import Cell, Maps, Row, Table
from openvision.evaluation.suites.results import Entry
from openvision.files import JsonObject
from openvision.frozen.perceptual import STAND_IN

# Metric of the evaluator -> head of its column and the number of digits.
_RECONSTRUCTION = {
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "l1": ("pixel L1", 3),
    "latents_l1": ("latent L1", 3),
    "lpips": ("LPIPS", 3),
    "distance_efficientnet_lite0": (f"distance on {STAND_IN}", 3),
    "rfid": ("rFID", 2),
    "fd_efficientnet_lite0": (f"FD on {STAND_IN}", 1),
}
_SIDES = {"": "this encoder", "autoencoder_": "autoencoder alone: the ceiling", "constant_": "one colour for all"}
_NEARNESS = {"fd_efficientnet_lite0": (f"FD on {STAND_IN}", 1), "agreement": ("asked text ranked first, %", 1)}


@dataclass(frozen=True)
class Generated:
    """Images that a generator made for texts of images that it was not trained on."""

    rows: dict[str, dict[str, float]]
    """What is measured -> metric -> value; shares from 0 to 1."""
    facts: JsonObject
    """How they were made and measured: `field`, `images`, `texts`, `steps`, `guidance`, `seed`."""
    texts: list[str]
    """Of the examples."""
    true: NDArray[np.uint8]
    """(n, H, W, 3): an image that has the text."""
    reconstructed: NDArray[np.uint8]
    """The same through encoder and decoder."""
    made: NDArray[np.uint8]
    """What the generator made for the text."""

    def examples(self, album: Album) -> list[Maps]:
        """The examples, their images kept in `album`."""
        sides = zip(self.texts, self.true, self.reconstructed, self.made, strict=True)
        return [Maps(text, album.add(own), [album.add(again), album.add(new)]) for text, own, again, new in sides]

    def table(self) -> Table:
        """The numbers."""
        rows = [
            Row(
                name,
                [
                    _cell(values.get(metric), 100 if metric == "agreement" else 1, digits)
                    for metric, (_, digits) in _NEARNESS.items()
                ],
            )
            for name, values in self.rows.items()
        ]
        return Table("images", [head for head, _ in _NEARNESS.values()], rows)


def reconstruction_table(measured: Mapping[str, Entry]) -> Table | None:
    """The numbers of the first evaluator of reconstruction beside its controls; None where there is none."""
    values = next((entry["values"] for entry in measured.values() if entry["kind"] == "reconstruction"), None)
    if values is None:
        return None
    columns = {metric: shown for metric, shown in _RECONSTRUCTION.items() if metric in values}
    rows = [
        Row(name, [_cell(values.get(prefix + metric), 1, digits) for metric, (_, digits) in columns.items()])
        for prefix, name in _SIDES.items()
    ]
    return Table("images", [head for head, _ in columns.values()], rows)


def _cell(value: float | None, factor: float, digits: int) -> Cell:
    return Cell("–", -1) if value is None else Cell(f"{factor * value:.{digits}f}", value)

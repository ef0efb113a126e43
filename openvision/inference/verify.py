"""Is a downloaded checkpoint the encoder it should be? Strict loading, parameter count, a few drawn pictures.

The pictures are OpenMoji's, drawn from the package the quickstart uses: nothing is downloaded beside the checkpoint.
Their names are everyday words, so that any encoder trained on the web gets most of them; chance is one in eight.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from openvision.data.sources.openmoji.glyphs import render_glyph
from openvision.inference.encoder import Encoder
from openvision.weights.load import Request, load_checkpoint
from openvision.weights.registry import available_models, released

PICTURES = {
    "\U0001f431": "a cat",
    "\U0001f34e": "a red apple",
    "\U0001f697": "a car",
    "\U0001f332": "a tree",
    "\U0001f3e0": "a house",
    "\U0001f41f": "a fish",
    "\U0001f382": "a birthday cake",
    "\U0001f3b8": "a guitar",
}
# Web-trained encoders read such drawings well; far above chance, below what a good one reaches.
_LEAST_RIGHT = 5
_SIZE = 384


@dataclass(frozen=True)
class Verification:
    """What was found."""

    source: str
    parameters: int
    expected_parameters: int | None
    """Of the registry; None for a checkpoint that is not in it."""
    answers: tuple[tuple[str, str, float], ...] | None
    """True label, best label, its probability; None without a text tower."""

    @property
    def right(self) -> int:
        """Pictures whose best label is the true one."""
        return sum(true == best for true, best, _ in self.answers or ())

    @property
    def passed(self) -> bool:
        """Whether the count is the released one and enough pictures are recognised."""
        counted = self.expected_parameters in (None, self.parameters)
        return counted and (self.answers is None or self.right >= _LEAST_RIGHT)

    def lines(self) -> list[str]:
        """What to print."""
        told = "" if self.expected_parameters is None else f" (released: {self.expected_parameters:,})"
        lines = [f"{self.source}: loaded strictly; {self.parameters:,} parameters in the vision tower{told}"]
        if self.answers is None:
            return [*lines, "no text tower: nothing to classify"]
        lines += [f"  {true:<16} -> {best:<16} {share:6.1%}" for true, best, share in self.answers]
        return [*lines, f"{self.right} of {len(self.answers)} drawings recognised (at least {_LEAST_RIGHT} expected)"]


def verify(
    source: str, vocabulary: Path | None = None, revision: str | None = None, offline: bool = False
) -> Verification:
    """Load `source` and classify the drawings; raises OpenVisionError when it does not load."""
    loaded = load_checkpoint(source, Request(vocabulary=vocabulary, revision=revision, offline=offline))
    expected = released(source).parameters if source in available_models() else None
    count = sum(parameter.numel() for parameter in loaded.vision.parameters())
    answers = None
    if loaded.model is not None:
        answers = tuple(_answers(Encoder.from_checkpoint(loaded)))
    return Verification(loaded.source, count, expected, answers)


def _answers(encoder: Encoder) -> list[tuple[str, str, float]]:
    labels = list(PICTURES.values())
    images = encoder.encode_images([_drawn(character) for character in PICTURES])
    texts = encoder.encode_texts([f"a drawing of {label}" for label in labels])
    shares = torch.softmax(encoder.scale * images @ texts.T, dim=-1)
    best = shares.argmax(dim=-1).tolist()
    return [
        (true, labels[index], shares[row, index].item())
        for row, (true, index) in enumerate(zip(labels, best, strict=True))
    ]


def _drawn(character: str) -> NDArray[np.uint8]:
    return render_glyph(character, _SIZE)

"""Verify a downloaded checkpoint: load it strictly, count its parameters, classify eight drawings.

The drawings are OpenMoji's, from the package that the quickstart uses: nothing but the checkpoint is downloaded. Their
names are everyday words, so any encoder trained on web data recognises most of them; chance is one in eight.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from openvision.data.sources.openmoji.glyphs import render_glyph
from openvision.inference.encoder import Encoder
from openvision.weights.load import Request, load_checkpoint
from openvision.weights.registry import available_models, released

DRAWINGS = {
    "\U0001f431": "a cat",
    "\U0001f34e": "a red apple",
    "\U0001f697": "a car",
    "\U0001f332": "a tree",
    "\U0001f3e0": "a house",
    "\U0001f41f": "a fish",
    "\U0001f382": "a birthday cake",
    "\U0001f3b8": "a guitar",
}
# Far above chance, and below what a good encoder reaches.
_LEAST_CORRECT = 5
_SIZE = 384


@dataclass(frozen=True)
class Verification:
    """Result of the checks."""

    source: str
    parameters: int
    expected_parameters: int | None
    """Parameters in the registry; None for a checkpoint that it does not list."""
    answers: tuple[tuple[str, str, float], ...] | None
    """True label, predicted label and its probability; None without a text tower."""

    @property
    def correct(self) -> int:
        """Drawings whose predicted label is the true one."""
        return sum(true == predicted for true, predicted, _ in self.answers or ())

    @property
    def passed(self) -> bool:
        """Whether the number of parameters is the released one and enough drawings are recognised."""
        counted = self.expected_parameters in (None, self.parameters)
        return counted and (self.answers is None or self.correct >= _LEAST_CORRECT)

    def lines(self) -> list[str]:
        """The report, line by line."""
        released_count = "" if self.expected_parameters is None else f" (released: {self.expected_parameters:,})"
        lines = [f"{self.source}: loaded strictly; {self.parameters:,} parameters in the vision tower{released_count}"]
        if self.answers is None:
            return [*lines, "no text tower: nothing to classify"]
        lines += [f"  {true:<16} -> {best:<16} {probability:6.1%}" for true, best, probability in self.answers]
        return [
            *lines,
            f"{self.correct} of {len(self.answers)} drawings recognised (at least {_LEAST_CORRECT} expected)",
        ]


def verify(
    source: str,
    vocabulary: Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    device: torch.device | None = None,
) -> Verification:
    """Load `source` and classify the drawings on `device`, by default the CPU.

    Raises OpenVisionError when it does not load.
    """
    loaded = load_checkpoint(source, Request(vocabulary=vocabulary, revision=revision, offline=offline))
    expected = released(source).parameters if source in available_models() else None
    count = sum(parameter.numel() for parameter in loaded.vision.parameters())
    answers = None
    if loaded.model is not None or loaded.unified is not None:
        answers = tuple(_answers(Encoder.from_checkpoint(loaded).to(device or torch.device("cpu"))))
    return Verification(loaded.source, count, expected, answers)


def _answers(encoder: Encoder) -> list[tuple[str, str, float]]:
    labels = list(DRAWINGS.values())
    images = encoder.encode_images([render_glyph(character, _SIZE) for character in DRAWINGS])
    texts = encoder.encode_texts([f"a drawing of {label}" for label in labels])
    probabilities = torch.softmax(encoder.scale * images @ texts.T, dim=-1)
    best = probabilities.argmax(dim=-1).tolist()
    return [
        (true, labels[index], probabilities[row, index].item())
        for row, (true, index) in enumerate(zip(labels, best, strict=True))
    ]

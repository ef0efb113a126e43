"""The texts of a sample in a training step (spec section 4).

The web alt-text, one random sentence of the synthetic caption, and the whole synthetic caption as target.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The original's rule: runs of full stops and exclamation marks, and the bar that it uses as a marker. Decimal points
# split too; question marks do not.
_SENTENCE_END = re.compile(r"[.!]+|\|")


@dataclass(frozen=True)
class Captions:
    """The three texts of one sample in one step."""

    alt: str
    sentence: str
    full: str


def sentences(caption: str | Sequence[str]) -> list[str]:
    """Split a synthetic caption into sentences, without empty ones."""
    text = caption if isinstance(caption, str) else " ".join(caption)
    return [piece for piece in _SENTENCE_END.split(text) if piece]


def non_blank(text: str | Sequence[str] | None) -> list[str]:
    """The texts of a field, which may hold one, several or none, without blank ones."""
    texts = [text] if isinstance(text, str) else list(text or ())
    return [text for text in texts if text.strip()]


def sample_captions(
    alt: str | Sequence[str], synthetic: str | Sequence[str] | None, rng: np.random.Generator
) -> Captions:
    """Draw one of several alt-texts, and one sentence of the synthetic caption.

    Without a synthetic caption, the alt-text takes the place of the sentence and of the whole caption.
    """
    chosen = alt if isinstance(alt, str) else alt[int(rng.integers(len(alt)))]
    pieces = sentences(synthetic) if synthetic else []
    if not pieces or not synthetic:
        return Captions(chosen, chosen, chosen)
    full = synthetic if isinstance(synthetic, str) else " ".join(synthetic)
    return Captions(chosen, pieces[int(rng.integers(len(pieces)))], full)

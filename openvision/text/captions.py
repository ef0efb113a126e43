"""Which texts a training step sees of a sample (spec section 4).

The web alt-text, one random sentence of the synthetic caption, and the whole synthetic caption as target.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# As the original splits: runs of full stops and exclamation marks, and the bar that it uses as a marker. Decimal
# points split too; question marks do not.
_SENTENCE_END = re.compile(r"[.!]+|\|")


@dataclass(frozen=True)
class Captions:
    """The three texts of one sample in one step."""

    alt: str
    sentence: str
    full: str


def sentences(caption: str | Sequence[str]) -> list[str]:
    """Split a synthetic caption into the pieces one of which is drawn; pieces of zero length are dropped."""
    text = caption if isinstance(caption, str) else " ".join(caption)
    return [piece for piece in _SENTENCE_END.split(text) if piece]


def sample_captions(
    alt: str | Sequence[str], synthetic: str | Sequence[str] | None, rng: np.random.Generator
) -> Captions:
    """Draw the alt-text if there are several, and one sentence of the synthetic caption.

    A sample without a synthetic caption takes its alt-text for the sentence and for the whole.
    """
    chosen = alt if isinstance(alt, str) else alt[int(rng.integers(len(alt)))]
    pieces = sentences(synthetic) if synthetic else []
    if not pieces or not synthetic:
        return Captions(chosen, chosen, chosen)
    full = synthetic if isinstance(synthetic, str) else " ".join(synthetic)
    return Captions(chosen, pieces[int(rng.integers(len(pieces)))], full)

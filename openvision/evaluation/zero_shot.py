"""Zero-shot classification: a picture gets the candidate whose name, as a text, lies nearest to it.

The candidates of a split are its own clean, unique names. A name is embedded through one or more prompt templates;
the unit vectors are averaged and made unit again.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError
from openvision.evaluation.metrics import similarity, target_ranks, with_interval, within, within_by_group

# The name as it stands. Which of the lists serves best is a question for the validation split.
PLAIN = ("{}",)
# A short list of our own for drawings and photographs alike.
PROMPTS = (
    "{}",
    "a picture of {}",
    "a drawing of {}",
    "a small icon of {}",
    "a close view of {}",
    "{} on a white background",
)

EncodeTexts = Callable[[Sequence[str]], NDArray[np.float32]]


def check_templates(templates: Sequence[str]) -> None:
    """Raise OpenVisionError unless every template has exactly one place for the name."""
    if not templates:
        raise OpenVisionError('the list of prompt templates is empty; give at least "{}"')
    for template in templates:
        if template.count("{}") != 1:
            raise OpenVisionError(f'the prompt template {template!r} must hold "{{}}" exactly once, for the name')


def class_embeddings(
    encode: EncodeTexts, names: Sequence[str], templates: Sequence[str] = PLAIN
) -> NDArray[np.float32]:
    """Unit vectors (c, E) of class names: the mean over templates of unit text vectors, made unit again."""
    check_templates(templates)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    vectors = encode(prompts)
    mean = vectors.reshape(len(names), len(templates), -1).mean(axis=1)
    return (mean / (np.linalg.norm(mean, axis=1, keepdims=True) + 1e-8)).astype(np.float32)


def candidates_of(labels: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Sorted distinct labels, and for every sample the position of its own."""
    candidates = sorted(set(labels))
    position = {label: index for index, label in enumerate(candidates)}
    return candidates, np.array([position[label] for label in labels], dtype=np.int64)


def classification_ranks(
    images: NDArray[np.floating], classes: NDArray[np.floating], targets: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Rank from 0 of each image's own class; images (n, E), classes (c, E), targets (n,)."""
    return target_ranks(similarity(images, classes), targets)


def classification(
    ranks: NDArray[np.integer], groups: Sequence[str] | None = None
) -> dict[str, float | list[float] | dict[str, float]]:
    """Top-1 and top-5 with intervals from ranks, and top-1 for every group."""
    result: dict[str, float | list[float] | dict[str, float]] = {
        **with_interval("top1", within(ranks, 1)),
        **with_interval("top5", within(ranks, 5)),
    }
    if groups is not None:
        by_group = within_by_group(ranks, groups, 1)
        result["top1_by_category"] = {str(group): by_group[group].value for group in sorted(by_group, key=str)}
    return result

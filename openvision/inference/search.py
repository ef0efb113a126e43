"""Find pictures in a folder by a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from openvision.errors import OpenVisionError
from openvision.inference.encoder import Encoder
from openvision.inference.vision import UnreadableImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class SearchResult:
    """Pictures that fit best, and what could not be searched."""

    hits: list[tuple[Path, float]]
    """Path and cosine, best first."""
    skipped: list[tuple[Path, str]]
    """Files with a picture's suffix that could not be read, and why."""


def pictures_in(folder: Path) -> list[Path]:
    """Pictures below `folder` by suffix, sorted; raises OpenVisionError when the folder or pictures are missing."""
    if not folder.is_dir():
        raise OpenVisionError(f"{folder} is not a folder; give a folder of pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise OpenVisionError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}); give another folder")
    return found


def search(encoder: Encoder, folder: Path, query: str, top: int = 5, batch_size: int = 64) -> SearchResult:
    """The `top` pictures below `folder` nearest to the text `query`.

    Unreadable pictures are skipped and listed; OpenVisionError when none can be read or the query is empty.
    """
    if not query.strip():
        raise OpenVisionError('the query is empty; say what to look for, e.g. "a red car"')
    if top < 1:
        raise OpenVisionError(f"top must be at least 1, not {top}")
    paths, images, skipped = _read(encoder, pictures_in(folder))
    if not paths:
        raise OpenVisionError(f"none of the {len(skipped)} pictures in {folder} can be read; first: {skipped[0][1]}")
    text = encoder.encode_texts([query])[0]
    vectors = encoder.encode_prepared(torch.stack(images), batch_size)
    scores = (vectors @ text).numpy()
    order = np.argsort(-scores, kind="stable")[:top]
    return SearchResult([(paths[i], float(scores[i])) for i in order], skipped)


def _read(
    encoder: Encoder, candidates: Sequence[Path]
) -> tuple[list[Path], list[torch.Tensor], list[tuple[Path, str]]]:
    """Paths and prepared pictures that could be read, and the rest with reasons."""
    paths: list[Path] = []
    images: list[torch.Tensor] = []
    skipped: list[tuple[Path, str]] = []
    for path in candidates:
        try:
            images.append(encoder.prepare(path))
            paths.append(path)
        except UnreadableImageError as error:
            skipped.append((path, str(error)))
    return paths, images, skipped

"""Ranks of right answers, from score matrices or embeddings alone.

- Ties are ranked pessimistically: a wrong candidate that scores the same as the right one stands before it. A model
  that gives every candidate the same score is therefore always wrong, not always right.
- Similarities of embeddings are summed in float64 and rounded to float32: equal vectors tie exactly, whatever the
  shape of the block they were computed in, so no number depends on a chunk size.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from openvision.encoding import check_features
from openvision.errors import OpenVisionError

Right = Callable[[NDArray[np.int64], slice], NDArray[np.bool_]]
"""Numbers of q queries, g rows of the gallery -> which answers are right, bool (q, g)."""


def target_ranks(scores: NDArray[np.floating], targets: NDArray[np.integer]) -> NDArray[np.int64]:
    """Rank, from 0, of column `targets[i]` in row i of `scores` (n, c), ties counted against it: int64 (n,)."""
    check_features(scores, "rows of scores")
    if targets.shape != (len(scores),) or targets.min() < 0 or targets.max() >= scores.shape[1]:
        raise OpenVisionError(f"targets must be {len(scores)} column numbers below {scores.shape[1]}")
    right = scores[np.arange(len(scores)), targets]
    # The target itself is among those that reach its score.
    return (scores >= right[:, None]).sum(axis=1).astype(np.int64) - 1


def similarity(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float32]:
    """Dot products (n, E) x (m, E) -> float32 (n, m), independent of how the rows are cut into blocks."""
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)


def retrieval_ranks(
    queries: NDArray[np.floating],
    gallery: NDArray[np.floating],
    query_ids: NDArray[np.integer] | None = None,
    gallery_ids: NDArray[np.integer] | None = None,
    chunk: int = 2048,
    right: Right | None = None,
) -> NDArray[np.int64]:
    """Rank, from 0, of each query's best right answer among the wrong ones: int64 (Q,).

    `queries` (Q, E) and `gallery` (G, E) are unit vectors; an answer is right when the ids agree. Without ids there is
    one caption an image and row i belongs to row i. With several captions an image, give the image's number of every
    caption as the ids of the captions and `arange` as the ids of the images. Where ids cannot say it, `right` does. At
    most `chunk` x `chunk` similarities are held at a time.
    """
    check_features(queries, "query features")
    check_features(gallery, "gallery features")
    query_ids = np.arange(len(queries)) if query_ids is None else query_ids
    gallery_ids = np.arange(len(gallery)) if gallery_ids is None else gallery_ids
    if len(query_ids) != len(queries) or len(gallery_ids) != len(gallery):
        raise OpenVisionError("there must be one id for every query and for every gallery row")
    orphans = ~np.isin(query_ids, gallery_ids)
    if orphans.any():
        raise OpenVisionError(f"query {int(orphans.argmax())} has no right answer in the gallery: check the pairs")
    ids, others = query_ids, gallery_ids
    right = right or (lambda rows, columns: ids[rows, None] == others[columns])
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        rows = np.arange(start, min(start + chunk, len(queries)))
        ranks[rows] = _ranks_of_block(queries[rows], gallery, rows, right, chunk)
    return ranks


def _ranks_of_block(
    queries: NDArray[np.floating],
    gallery: NDArray[np.floating],
    rows: NDArray[np.int64],
    right: Right,
    chunk: int,
) -> NDArray[np.int64]:
    """Two passes over the gallery: the best right score, then how many wrong ones reach it."""
    columns = [slice(start, start + chunk) for start in range(0, len(gallery), chunk)]
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    for column in columns:
        found = right(rows, column)
        if found.any():
            scores = np.where(found, similarity(queries, gallery[column]), -np.inf)
            best = np.maximum(best, scores.max(axis=1))
    ranks = np.zeros(len(queries), dtype=np.int64)
    for column in columns:
        ranks += (~right(rows, column) & (similarity(queries, gallery[column]) >= best[:, None])).sum(axis=1)
    return ranks


class EqualTexts:
    """Right answers where images share a text: a text is right for every image that has one equal to it."""

    def __init__(self, owner: NDArray[np.integer], text_ids: NDArray[np.integer], images: NDArray[np.integer]) -> None:
        """Text i has the number `text_ids[i]`, the same as its equals, and belongs to the image `owner[i]`.

        `images` are the ids of the images in the order of their rows; (m,), (m,), (n,).
        """
        order = np.argsort(owner, kind="stable")
        self._owner, self._numbers = owner[order], text_ids[order]
        self._ids, self._images = text_ids, images

    def of_texts(self, queries: NDArray[np.int64], columns: slice) -> NDArray[np.bool_]:
        """Text queries, rows of images -> bool."""
        return self._have(self._images[columns], self._ids[queries]).T

    def of_images(self, queries: NDArray[np.int64], columns: slice) -> NDArray[np.bool_]:
        """Image queries, rows of texts -> bool."""
        return self._have(self._images[queries], self._ids[columns])

    def _have(self, images: NDArray[np.integer], numbers: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Whether an image has a text of a number, bool (images, numbers)."""
        distinct, place = np.unique(numbers, return_inverse=True)
        begin, end = (np.searchsorted(self._owner, images, side) for side in ("left", "right"))
        table = np.zeros((len(images), len(distinct)), dtype=np.bool_)
        row = np.repeat(np.arange(len(images)), end - begin)
        first = np.repeat(end - np.cumsum(end - begin), end - begin)
        own = self._numbers[first + np.arange(len(row))]
        column = np.searchsorted(distinct, own).clip(max=len(distinct) - 1)
        found = distinct[column] == own
        table[row[found], column[found]] = True
        return table[:, place]

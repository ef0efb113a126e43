"""Decoder states of captions of different lengths, computed no further than each group of similar captions reaches.

Position i of a caption is seen by later positions only (the queries of version 1 and the text of version 2 are causal),
and the loss reads none past the caption's end: leaving those out changes no loss and no gradient.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 4
# Fewer captions than this together would make products too small to be fast.
SMALLEST_GROUP = 4


def states_by_length(
    lengths: Tensor | None, positions: int, states_of: Callable[[Tensor | slice, int], Tensor]
) -> Tensor:
    """States (B, positions, D) of captions with `lengths` int64 (B,), zeros where a whole group has ended.

    `states_of(rows, reach)` computes the first `reach` states of the captions `rows`, int64 (b,) or a slice ->
    (b, reach, D). Without `lengths` it is called once, for all of every caption.
    """
    if lengths is None:
        return states_of(slice(None), positions)
    order = lengths.argsort(stable=True)
    groups = order.chunk(max(1, min(GROUPS, len(order) // SMALLEST_GROUP)))
    parts = []
    for rows in groups:
        reach = max(1, int(lengths[rows].max()))
        parts.append(F.pad(states_of(rows, reach), (0, 0, 0, positions - reach)))
    return torch.cat(parts)[order.argsort()]

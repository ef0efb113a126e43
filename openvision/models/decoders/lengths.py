"""Texts and captions of different lengths, computed no further than each group of similar lengths reaches.

Position i of a caption is seen by later positions only (the queries of version 1 and the text of version 2 are causal),
and the loss reads none past the caption's end: leaving those out changes no loss and no gradient. A text tower that
masks padding reads nothing of it either.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from openvision.runtime import send

GROUPS = 4
# Fewer captions than this together would make products too small to be fast.
SMALLEST_GROUP = 4
REACH_ON_ACCELERATOR = 8
"""Groups reach to a multiple of this on an accelerator, whose allocator and compiler want few shapes."""

Lengths = Tensor | NDArray[np.int64]
"""Lengths of B texts, int64 (B,) on the host: as an array where the device is another, since FSDP2 moves the tensors
that a model is called with."""


@dataclass(frozen=True)
class LengthGroups:
    """The rows of a batch in groups of similar length, shortest first."""

    rows: list[Tensor]
    """Rows of each group, int64, on the device."""
    reaches: list[int]
    """Positions that each group is computed to."""
    back: Tensor
    """Where each row of the batch is among the groups' rows, int64 (B,), on the device."""


def groups_by_length(lengths: Lengths, positions: int, device: torch.device) -> LengthGroups:
    """Groups of rows with `lengths`, none reaching beyond `positions`. The host waits for no device."""
    known = torch.from_numpy(lengths) if isinstance(lengths, np.ndarray) else lengths
    order = known.argsort(stable=True)
    groups = max(1, min(GROUPS, len(order) // SMALLEST_GROUP))
    reaches = [max(1, int(known[rows].max())) for rows in order.chunk(groups)]
    if device.type != "cpu":
        step = REACH_ON_ACCELERATOR
        reaches = [min(-(-reach // step) * step, positions) for reach in reaches]
    there, back = send(torch.stack([order, order.argsort()]), device).unbind()
    return LengthGroups(list(there.chunk(groups)), reaches, back)


def states_by_length(
    lengths: Lengths | None, positions: int, states_of: Callable[[Tensor | slice, int], Tensor], device: torch.device
) -> Tensor:
    """States (B, positions, D) of captions with `lengths`, zeros where a whole group has ended.

    `states_of(rows, reach)` computes the first `reach` states of the captions `rows`, int64 (b,) or a slice ->
    (b, reach, D), on `device`. Without `lengths` it is called once, for all of every caption.
    """
    if lengths is None:
        return states_of(slice(None), positions)
    groups = groups_by_length(lengths, positions, device)
    parts = [
        F.pad(states_of(rows, reach), (0, 0, 0, positions - reach))
        for rows, reach in zip(groups.rows, groups.reaches, strict=True)
    ]
    return torch.cat(parts)[groups.back]

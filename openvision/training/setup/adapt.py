"""Parameters of a warm start brought to another shape: patch size, depth, vocabulary and context.

Each change is asked for by name in the recipe's [warm_start], since none of them is exact:

- patch size: the patch filters are resampled by the pseudo-inverse (FlexiViT, arXiv 2212.08013): for patches that were
  resized bilinearly, the new filter gives as nearly as possible what the old one gave for the original.
- depth: each block takes over one block of the start, those in even distances or the first ones.
- vocabulary: rows of entries that mean the same in both vocabularies are copied; the others stay as initialised.
- context: positions that both have are copied, and the class token's behind them; the others stay as initialised.
"""

import re
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision.text.entries import same_meaning
from openvision.text.tokenizer import Tokenizer

Layers = Literal["even", "first"]
PATCHES = "patch_embed.proj.weight"
# Rows of these belong to entries of the vocabulary; the decoders' heads are matrices (entries, width) too.
TEXT_ROWS, DECODER_ROWS = ("token_embed.weight",), ("token_embed.weight", "head.weight")
TEXT_POSITIONS, DECODER_POSITIONS = ("pos_embed",), ("pos_embed", "queries")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")


def resample_patches(filters: Tensor, patch_size: int) -> Tensor:
    """Patch filters (D, C, p, p) -> (D, C, patch_size, patch_size) in the same dtype."""
    old = filters.shape[-1]
    if old == patch_size:
        return filters
    # Column i is the resized i-th unit patch: `resize @ x` is a patch of p * p pixels in the new size.
    units = torch.eye(old * old, dtype=torch.float64).unflatten(1, (1, old, old))
    resize = F.interpolate(units, (patch_size, patch_size), mode="bilinear", antialias=True).flatten(1).T
    # <resize @ x, new> = <x, old> for all x, in the least-squares sense.
    new = filters.detach().double().flatten(2) @ torch.linalg.pinv(resize)
    return new.unflatten(2, (patch_size, patch_size)).to(filters.dtype)


def chosen_layers(wanted: int, given: int, how: Layers) -> list[int]:
    """Which of `given` blocks each of `wanted` blocks takes over.

    "even" spreads them from the first to the last; with more blocks than are given some are taken twice. "first" takes
    the first ones, and leaves the blocks beyond the last as initialised.
    """
    if how == "first":
        return list(range(min(wanted, given)))
    return [round(index * (given - 1) / max(wanted - 1, 1)) for index in range(wanted)]


def with_layers(given: Mapping[str, Tensor], layers: list[int]) -> dict[str, Tensor]:
    """Parameters of a tower whose block i is block `layers[i]` of `given`."""
    found = {name: tensor for name, tensor in given.items() if not _BLOCK.fullmatch(name)}
    for index, layer in enumerate(layers):
        prefix = f"blocks.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}
        found |= {f"blocks.{index}.{rest}": tensor for rest, tensor in own.items()}
    return found


def shared_entries(ours: Tokenizer, theirs: Tokenizer) -> tuple[Tensor, Tensor]:
    """Ids of the entries that mean the same in both vocabularies, int64 (n,): ours, and theirs of the same meaning."""
    given = theirs.meanings()
    found = [(index, same_meaning(meaning, given)) for meaning, index in ours.meanings().items()]
    both = sorted((index, same) for index, same in found if same is not None)
    return torch.tensor([index for index, _ in both]), torch.tensor([same for _, same in both])


def with_entries(fresh: Tensor, given: Tensor, shared: tuple[Tensor, Tensor]) -> Tensor:
    """Rows of `given` for shared entries, those of `fresh` for the others; (V, D)."""
    ours, theirs = shared
    rows = fresh.detach().clone()
    rows[ours] = given.detach()[theirs]
    return rows


def with_positions(fresh: Tensor, given: Tensor, last: int) -> Tensor:
    """Positions (..., L, D) of `given` at their places, its `last` ones at the end; those of `fresh` between."""
    kept = min(fresh.shape[-2], given.shape[-2]) - last
    positions = fresh.detach().clone()
    positions[..., :kept, :] = given.detach()[..., :kept, :]
    if last:
        positions[..., -last:, :] = given.detach()[..., -last:, :]
    return positions

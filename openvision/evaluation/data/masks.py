"""Images with masks: which patch shows what, exactly.

A mask is a PNG in base64 in a json field: 0 the ground, 1, 2, ... the objects in the order of another field, 255 a
printed word. `openvision data scenes` writes both.
"""

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from openvision.data.shards.store import join_folder
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ImageSet, ShardImages
from openvision.evaluation.data.options import open_images

GROUND, WORD = "(ground)", "(word)"
# Values of a mask: the ground, then 1, 2, ... for the objects in order, and this for a printed word.
_WORD_VALUE = 255

Truth = NDArray[np.int64]


@dataclass(frozen=True)
class Masks:
    """Images with a mask each."""

    images: ImageSet
    masks: list[str]
    """PNGs in base64."""
    objects: list[list[str]]
    """Names of the values 1, 2, ... of each mask."""

    def truth(self, rows: NDArray[np.int64], names: list[str], grid: tuple[int, int]) -> Truth:
        """What covers most of each patch of the images `rows`: numbers among `names`, (r, N); `grid` is in patches.

        Raises OpenVisionError for a mask that is no square PNG, or that has a value without a name.
        """
        number = {name: index for index, name in enumerate(names)}
        found = np.empty((len(rows), grid[0] * grid[1]), dtype=np.int64)
        for place, row in enumerate(rows):
            key = f"{self.images.name}: sample {self.images.keys[row]}"
            mask = _decoded(self.masks[row], key)
            values = {0: GROUND, _WORD_VALUE: WORD} | dict(enumerate(self.objects[row], start=1))
            present = np.unique(mask)
            for value in present:
                if values.get(int(value)) not in number:
                    raise OpenVisionError(f"{key}: its mask has the value {value}, which no object has; write it again")
            layers = torch.from_numpy(np.stack([mask == value for value in present])).float()
            covered = F.adaptive_avg_pool2d(layers, grid).flatten(1).argmax(dim=0).numpy()
            found[place] = np.array([number[values[int(value)]] for value in present])[covered]
        return found


def open_masks(data: str, root: str | Path, mask: str, objects: str, limit: int | None = None) -> Masks:
    """The images of `data` below `root` with the masks in the json field `mask`, about `limit` of them.

    `objects` is the field with the names of the objects of a mask, in order. Raises OpenVisionError for a sample
    without them.
    """
    images = open_images(data, root, limit)
    shards = ShardImages(join_folder(root, data))
    number = {entry.key: row for row, (_, entry) in enumerate(shards.places)}
    rows = [number[key] for key in images.keys]
    masks, names = shards.values(mask), shards.values(objects)
    for key, row in zip(images.keys, rows, strict=True):
        if row in shards.bad:
            masks[row], names[row] = "", []
        if not isinstance(masks[row], str) or not isinstance(names[row], list):
            raise OpenVisionError(
                f"{images.name}: sample {key} lacks {mask!r} or {objects!r}; name the json fields with "
                "the mask and with its objects"
            )
    return Masks(images, [str(masks[row]) for row in rows], [_texts(names[row]) for row in rows])


def _decoded(text: str, key: str) -> NDArray[np.uint8]:
    try:
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))).convert("L"))
    except (binascii.Error, OSError) as error:
        raise OpenVisionError(f"{key}: its mask is no PNG in base64 ({error}); write the shards again") from error
    if mask.shape[0] != mask.shape[1]:
        raise OpenVisionError(f"{key}: its mask has {mask.shape[1]} x {mask.shape[0]} px; only squares can be measured")
    return mask


def _texts(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []

"""Near-duplicate and placeholder images by a perceptual hash.

Two images are near-duplicates when their difference hashes (is a pixel brighter than its right neighbour, 8 x 8 times)
differ in at most three bits and their 8 x 8 thumbnails are of nearly the same colours: the hash alone takes all plain
images for one. A placeholder is what a web server sends for an image that is gone: one image in many places, or a plain
one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 8
_BITS = 3
# Mean and largest difference of two thumbnails, of 255: small objects on one background change a few pixels much.
_COLOUR, _SPOT = 6.0, 40
# Range of the colours of a plain image's thumbnail, of 255.
_PLAIN = 4


@dataclass(frozen=True)
class Fingerprint:
    """What is compared of an image."""

    hash: int
    """64 bits."""
    thumbnail: NDArray[np.uint8]
    """(8, 8, 3)."""

    @property
    def is_plain(self) -> bool:
        """Whether the image has one colour."""
        spread = self.thumbnail.max(axis=(0, 1)).astype(int) - self.thumbnail.min(axis=(0, 1))
        return bool(spread.max() <= _PLAIN)


def fingerprint(pixels: NDArray[np.uint8]) -> Fingerprint:
    """RGB pixels (H, W, 3) -> their fingerprint."""
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)).astype(np.int16)
    bits = (grey[:, :-1] > grey[:, 1:]).reshape(-1)
    thumbnail = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
    return Fingerprint(int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail)


def near_duplicates(fingerprints: Sequence[Fingerprint]) -> list[list[int]]:
    """Groups of at least two indices of near-duplicate images, largest first, each in ascending order."""
    hashes = np.array([one.hash for one in fingerprints], dtype=np.uint64)
    thumbnails = np.array([one.thumbnail for one in fingerprints], dtype=np.uint8).reshape(len(hashes), -1)
    leader = list(range(len(hashes)))
    # Hashes that differ in at most three bits agree in one of four quarters.
    for quarter in range(_BITS + 1):
        buckets: dict[int, list[int]] = defaultdict(list)
        for index, value in enumerate(hashes >> np.uint64(16 * quarter) & np.uint64(0xFFFF)):
            buckets[int(value)].append(index)
        for bucket in buckets.values():
            if len(bucket) > 1:
                _join(bucket, hashes, thumbnails, leader)
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(leader)):
        groups[_find(leader, index)].append(index)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group[0]))


def _join(bucket: list[int], hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8], leader: list[int]) -> None:
    """Compare the images of a bucket with the first one of every group in it."""
    firsts: list[int] = []
    for index in bucket:
        if firsts:
            near = np.bitwise_count(hashes[firsts] ^ hashes[index]) <= _BITS
            candidates = np.array(firsts)[near]
            apart = np.abs(thumbnails[candidates].astype(np.int16) - thumbnails[index])
            alike = np.flatnonzero((apart.mean(axis=1) <= _COLOUR) & (apart.max(axis=1) <= _SPOT))
            if len(alike):
                one, other = _find(leader, index), _find(leader, int(candidates[alike[0]]))
                leader[max(one, other)] = min(one, other)
                continue
        firsts.append(index)


def _find(leader: list[int], index: int) -> int:
    while leader[index] != index:
        leader[index] = leader[leader[index]]
        index = leader[index]
    return index

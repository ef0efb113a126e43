"""What is in a scene, sampled from a seed: groups of objects, background, printed word; and what each split may hold.

Combinations of two kinds, and of a kind with a background colour, are held out by a hash of their names: a tenth of
each never occurs in training. Every scene is a function of (version, seed, split, index) alone.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from openvision.data.sources.scenes.objects import COLOURS, HELD_OUT_WORDS, TEXTURES, WORDS, Kind
from openvision.errors import OpenVisionError

VERSION = 2
TRAIN, VALIDATION = "train", "validation"
COMBINATIONS, NEW_WORDS, SINGLE = "heldout_combinations", "heldout_words", "single_objects"
NEW_DRAWINGS = "heldout_drawings"
SPLITS = (TRAIN, VALIDATION, COMBINATIONS, NEW_WORDS, SINGLE, NEW_DRAWINGS)

T = TypeVar("T")
_HELD_OUT_SHARE = 0.1
_TRIES = 10_000
# Where the groups of a scene are: place, centre, width and height as shares of the side; one layout is drawn.
Slot = tuple[str, float, float, float, float]
_LAYOUTS: dict[int, tuple[tuple[Slot, ...], ...]] = {
    1: ((("middle", 0.5, 0.5, 0.84, 0.84),),),
    2: (
        (("left", 0.26, 0.5, 0.46, 0.84), ("right", 0.74, 0.5, 0.46, 0.84)),
        (("top", 0.5, 0.26, 0.84, 0.46), ("bottom", 0.5, 0.74, 0.84, 0.46)),
    ),
    3: (
        (("left", 0.18, 0.5, 0.31, 0.84), ("middle", 0.5, 0.5, 0.31, 0.84), ("right", 0.82, 0.5, 0.31, 0.84)),
        (
            ("bottom left", 0.26, 0.74, 0.46, 0.46),
            ("bottom right", 0.74, 0.74, 0.46, 0.46),
            ("top", 0.5, 0.26, 0.84, 0.46),
        ),
    ),
}
# On canvases that are much wider or higher than a square the groups stand in a row or in a column.
_ROWS = {number: layouts[0] for number, layouts in _LAYOUTS.items()}
_COLUMNS: dict[int, tuple[Slot, ...]] = {
    1: _ROWS[1],
    2: _LAYOUTS[2][1],
    3: (("top", 0.5, 0.18, 0.84, 0.31), ("middle", 0.5, 0.5, 0.84, 0.31), ("bottom", 0.5, 0.82, 0.84, 0.31)),
}
_WIDE, NARROWEST, WIDEST = 1.5, 0.125, 8.0
# Share of a wide canvas that a printed word takes beside the objects.
_WORD_COLUMN = 0.3
_SIZES = {"small": 0.65, "medium": 0.82, "large": 1.0}
_ABOVE_OR_BELOW, _BESIDE = ("above", "below"), ("to the left of", "to the right of")
# Printed words are larger or smaller than asked for by this share at most: 24 to 28 px of 96 by default.
_WORD_SPREAD = 0.08
SMALLEST_WORD, LARGEST_WORD = 0.125, 0.4
"""Sizes of printed words, shares of the side."""


@dataclass(frozen=True)
class World:
    """What scenes are composed of; shares are probabilities."""

    kinds: tuple[Kind, ...]
    groups: tuple[float, ...] = (0.35, 0.4, 0.25)
    """Weights of one, two and three groups."""
    counts: tuple[float, ...] = (0.65, 0.2, 0.15)
    """Weights of one, two and three objects in a group."""
    word_share: float = 0.5
    """Scenes with a printed word."""
    word_size: float = 0.27
    """Size of printed words (an em), a share of the side; they are printed smaller where they would not fit."""
    texture_share: float = 0.4
    """Backgrounds that are not plain."""
    aspects: tuple[float, ...] = (1.0,)
    """Width over height of the images, each as probable as the others."""

    def __post_init__(self) -> None:
        if not self.aspects or not all(NARROWEST <= aspect <= WIDEST for aspect in self.aspects):
            given = ", ".join(f"{aspect:g}" for aspect in self.aspects) or "none"
            raise OpenVisionError(
                f"the aspects ({given}) must be between {NARROWEST} and {WIDEST:g}: width over height of the images"
            )
        for name, value in (("word share", self.word_share), ("texture share", self.texture_share)):
            if not 0 <= value <= 1:
                raise OpenVisionError(f"the {name} {value} must be between 0 and 1")
        if not SMALLEST_WORD <= self.word_size <= LARGEST_WORD:
            raise OpenVisionError(
                f"the word size {self.word_size} must be between {SMALLEST_WORD} and {LARGEST_WORD} of the side: "
                "smaller words cannot be read, larger ones leave no room"
            )
        unseen = [kind.name for kind in self.kinds if not self._can_be_trained(kind)]
        if unseen or len(self.kinds) < len(self.groups):
            few = f"{len(self.kinds)} kinds of objects" + (f" (none may stand beside {unseen[0]})" if unseen else "")
            raise OpenVisionError(f"{few} are too few for the split: some would never be seen in training; use more")

    def _can_be_trained(self, kind: Kind) -> bool:
        colours = any(not is_held_out(kind.name, colour) for colour in COLOURS)
        return colours and any(not is_held_out(kind.name, other.name) for other in self.kinds if other != kind)


@dataclass(frozen=True)
class Group:
    """Some objects of one kind."""

    kind: Kind
    count: int
    place: str
    size: str
    x: float
    y: float
    """Centre, shares of the side."""
    width: float
    height: float
    """Room of the group, shares of the side."""


@dataclass(frozen=True)
class Word:
    """A printed word and where it stands."""

    text: str
    place: str
    """above or below the objects; to the left of or to the right of them on wide images."""
    band: float
    """Height of the room above or below, a share of the image's; width of the room beside them."""
    size: float
    """An em, a share of the side of a square of the image's area."""
    x: float
    y: float
    """Where in its room, 0 to 1 from left and top."""
    font: int
    colour: tuple[int, int, int]

    @property
    def is_beside(self) -> bool:
        """Whether it stands left or right of the objects."""
        return self.place in _BESIDE

    @property
    def is_first(self) -> bool:
        """Whether it stands above or left of them."""
        return self.place in (_BESIDE[0], _ABOVE_OR_BELOW[0])


@dataclass(frozen=True)
class Scene:
    """A scene before it is painted."""

    groups: tuple[Group, ...]
    colour: str
    texture: str
    word: Word | None
    aspect: float = 1.0
    """Width over height."""

    def canvas(self, size: int) -> tuple[int, int]:
        """Width and height in pixels of an image with the area of a square of `size`."""
        root = self.aspect**0.5
        return round(size * root), round(size / root)

    def relation(self, first: int, second: int) -> str:
        """Where the first group is, seen from the second: "to the left of", "above" and so on."""
        a, b = self.groups[first], self.groups[second]
        if abs(a.x - b.x) >= abs(a.y - b.y):
            return "to the left of" if a.x < b.x else "to the right of"
        return "above" if a.y < b.y else "below"

    def describe(self) -> dict[str, object]:
        """The scene as the sample's json tells it."""
        return {
            "groups": [
                {
                    "kind": group.kind.name,
                    "category": group.kind.category,
                    "count": group.count,
                    "place": group.place,
                    "size": group.size,
                }
                for group in self.groups
            ],
            "relations": [[i, self.relation(i, j), j] for i, j in combinations(range(len(self.groups)), 2)],
            "background": {"colour": self.colour, "texture": self.texture},
            "word": {"text": self.word.text, "place": self.word.place} if self.word else None,
        }


class Draw:
    """Random choices from `random.random` alone, whose sequence Python promises to keep."""

    def __init__(self, *key: object) -> None:
        self._random = random.Random("/".join(map(str, key)))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random.random() < probability

    def between(self, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        return low + (high - low) * self._random.random()

    def one(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self._random.random() * len(items))]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, as probable as its weight."""
        left = self._random.random() * sum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return len(weights) - 1

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        rest = list(items)
        return [rest.pop(int(self._random.random() * len(rest))) for _ in range(count)]


def is_held_out(*names: str) -> bool:
    """Whether training never shows these two together."""
    digest = hashlib.sha256(f"scenes {VERSION}: {'|'.join(sorted(names))}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELD_OUT_SHARE * 2**32


def held_out_combinations(scene: Scene) -> Iterator[tuple[str, str]]:
    """The pairs of this scene that training never shows."""
    names = [group.kind.name for group in scene.groups]
    pairs = [*combinations(names, 2), *((name, scene.colour) for name in names)]
    return (pair for pair in pairs if is_held_out(*pair))


def sample_scene(world: World, split: str, seed: int, index: int) -> Scene:
    """Scene `index` of a split."""
    draw = Draw(VERSION, seed, split, index)
    # A stream of its own: squares are what they are without other aspects.
    aspect = Draw(VERSION, seed, split, index, "aspect").one(world.aspects)
    wanted = _ACCEPTED.get(split, _is_trained)
    for _ in range(_TRIES):
        scene = _sample(world, split, aspect, draw)
        if wanted(scene):
            return scene
    raise OpenVisionError(f"no scene of split {split} is possible with {len(world.kinds)} kinds of objects; use more")


def _is_trained(scene: Scene) -> bool:
    return next(held_out_combinations(scene), None) is None


_ACCEPTED: dict[str, Callable[[Scene], bool]] = {COMBINATIONS: lambda scene: not _is_trained(scene)}


def _layouts(number: int, aspect: float) -> tuple[tuple[Slot, ...], ...]:
    if aspect >= _WIDE:
        return (_ROWS[number],)
    return (_COLUMNS[number],) if aspect <= 1 / _WIDE else _LAYOUTS[number]


def _sample(world: World, split: str, aspect: float, draw: Draw) -> Scene:
    single = split == SINGLE
    number = 1 if single else 1 + draw.weighted(world.groups)
    colour = draw.one(tuple(COLOURS))
    texture = draw.one(TEXTURES[1:]) if draw.chance(world.texture_share) else TEXTURES[0]
    word = None
    if split == NEW_WORDS or (not single and draw.chance(world.word_share)):
        ink = (255, 255, 255) if colour == "black" else draw.one(((0, 0, 0), (170, 0, 0), (0, 0, 140)))
        words = HELD_OUT_WORDS if split == NEW_WORDS else WORDS
        size = world.word_size * draw.between(1 - _WORD_SPREAD, 1 + _WORD_SPREAD)
        place = draw.between(0, 1), draw.between(0, 1)
        sides, band = (_ABOVE_OR_BELOW, world.word_size * aspect**0.5) if aspect < _WIDE else (_BESIDE, _WORD_COLUMN)
        word = Word(draw.one(words), draw.one(sides), band, size, *place, draw.one(range(1000)), ink)
    slots = draw.one(_layouts(number, aspect))
    groups = []
    for kind, (place, x, y, width, height) in zip(draw.some(world.kinds, number), slots, strict=True):
        count = 1 if single else 1 + draw.weighted(world.counts)
        size = tuple(_SIZES)[draw.weighted((0.25, 0.5, 0.25))]
        x, y = x + draw.between(-0.02, 0.02), y + draw.between(-0.02, 0.02)
        if word is not None and word.is_beside:
            x = x * (1 - word.band) + (word.band if word.is_first else 0)
            width *= 1 - word.band
        elif word is not None:
            y = y * (1 - word.band) + (word.band if word.is_first else 0)
            height *= 1 - word.band
        groups.append(Group(kind, count, place, size, x, y, width * _SIZES[size], height * _SIZES[size]))
    return Scene(tuple(groups), colour, texture, word, aspect)

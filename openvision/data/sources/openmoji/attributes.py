"""Visual attributes measured on a drawing: main colours, extent, symmetry, roundness.

Outlines and the background are not colours of a drawing, but white inside an outline is: a zebra is white. So the
background is what near-white pixels reach from the border, and a colour counts where a pixel equals its neighbours,
which rules out outlines and antialiased edges.
"""

from dataclasses import dataclass

import numpy as np

# Colours of the OpenMoji palette and the words for them.
_PALETTE: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((234, 90, 71), (210, 47, 39), (190, 40, 40)),
    "orange": ((241, 143, 38), (226, 121, 36), (230, 160, 90)),
    "yellow": ((252, 234, 43), (241, 179, 27), (245, 205, 60)),
    "green": ((92, 158, 49), (177, 204, 51), (60, 170, 90)),
    "blue": ((97, 178, 228), (30, 80, 160), (146, 211, 245), (40, 110, 200)),
    "purple": ((185, 154, 201), (138, 79, 158), (120, 60, 150)),
    "pink": ((255, 167, 192), (231, 93, 148), (240, 150, 170)),
    "brown": ((165, 121, 57), (107, 66, 38), (106, 70, 47), (150, 90, 60), (92, 60, 40)),
    "beige": ((250, 220, 188), (222, 187, 144), (193, 154, 101), (230, 200, 165)),
    "grey": ((155, 155, 154), (208, 207, 206), (111, 111, 110)),
    "black": ((0, 0, 0), (63, 63, 63)),
    "white": ((255, 255, 255),),
}
_WORDS = [word for word, shades in _PALETTE.items() for _ in shades]
_SHADES = np.array([shade for shades in _PALETTE.values() for shade in shades], dtype=np.float32)
_LEAST_SHARE = 0.08
_BACKGROUND, _FLAT = 245, 12


@dataclass(frozen=True)
class VisualAttributes:
    """Attributes of one drawing."""

    colours: tuple[str, ...]
    """Up to three main colours of the filled areas, largest first; of the lines where nothing is filled."""
    leading_share: float
    """Share of the first colour in all filled areas."""
    leading_extent: float
    """Share of the first colour in the bounding box: low where an open outline lets the background in."""
    filled: bool
    """Whether the drawing has filled areas, not only lines."""
    width: float
    height: float
    """Size of the bounding box as a share of the image's side."""
    symmetry: float
    """Share of pixels that equal their left-right mirror image."""
    round: bool
    """Whether the silhouette is a disc."""


def measure(pixels: np.ndarray) -> VisualAttributes:
    """Attributes of a drawing on white, uint8 (H, W, 3)."""
    values = pixels.astype(np.int16)
    background = values.min(axis=2) >= _BACKGROUND
    border = np.zeros_like(background)
    border[0], border[-1], border[:, 0], border[:, -1] = True, True, True, True
    body = ~_reached(border & background, background)
    rows, columns = np.flatnonzero(body.any(axis=1)), np.flatnonzero(body.any(axis=0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    areas = values[body & _flat(values)]
    # Fewer pixels than this are the insides of thick lines.
    filled = len(areas) >= 0.05 * body.sum()
    colours, share = _main_colours(areas if filled else values[body & (values.min(axis=2) < 128)])
    height, width = body[box].shape
    return VisualAttributes(
        colours=colours,
        leading_share=share,
        leading_extent=share * len(areas) / body[box].size if filled else 0.0,
        filled=filled,
        width=width / pixels.shape[1],
        height=height / pixels.shape[0],
        symmetry=_symmetry(values[box], body[box]),
        round=_is_disc(body[box]),
    )


def _reached(start: np.ndarray, open_: np.ndarray) -> np.ndarray:
    """Flood fill: pixels reachable from `start` through `open_`, both bool (H, W), along rows and columns."""
    reached = start
    while True:
        before = reached.sum()
        for flip, turn in ((1, False), (-1, False), (1, True), (-1, True)):
            seen, free = (reached.T, open_.T) if turn else (reached, open_)
            swept = _swept(seen[:, ::flip], free[:, ::flip])[:, ::flip]
            reached = swept.T if turn else swept
        if reached.sum() == before:
            return reached


def _swept(seen: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Spread `seen` to the right up to the next wall: the last seen pixel must come after the last wall."""
    index = np.arange(seen.shape[1])
    last_seen = np.maximum.accumulate(np.where(seen, index, -1), axis=1)
    last_wall = np.maximum.accumulate(np.where(free, -2, index), axis=1)
    return np.asarray(last_seen > last_wall)


def _flat(values: np.ndarray) -> np.ndarray:
    """Pixels that equal their eight neighbours within a tolerance, bool (H, W)."""
    low = high = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
    # Separable, rows after columns: much faster than windows of nine.
    high = np.maximum(np.maximum(high[:-2], high[1:-1]), high[2:])
    low = np.minimum(np.minimum(low[:-2], low[1:-1]), low[2:])
    high = np.maximum(np.maximum(high[:, :-2], high[:, 1:-1]), high[:, 2:])
    low = np.minimum(np.minimum(low[:, :-2], low[:, 1:-1]), low[:, 2:])
    return np.asarray((high - low <= _FLAT).all(axis=2))


def _main_colours(pixels: np.ndarray) -> tuple[tuple[str, ...], float]:
    if not len(pixels):
        return ("black",), 1.0
    distances = np.linalg.norm(pixels[:, None].astype(np.float32) - _SHADES[None], axis=2)
    words, counts = np.unique(np.array(_WORDS)[distances.argmin(axis=1)], return_counts=True)
    share = dict(zip(words.tolist(), (counts / len(pixels)).tolist(), strict=True))
    ranked = sorted(share, key=lambda word: (-share[word], word))
    main = [word for word in ranked if share[word] >= _LEAST_SHARE] or ranked[:1]
    return tuple(main[:3]), share[main[0]]


def _symmetry(values: np.ndarray, body: np.ndarray) -> float:
    """Compare within the bounding box, allowing a shift of one pixel, because centring rounds to pixels."""
    best = 0.0
    inked = body | body[:, ::-1]
    for shift in (-1, 0, 1):
        mirrored = np.roll(values[:, ::-1], shift, axis=1)
        best = max(best, float((np.abs(values - mirrored).max(axis=2) < 90)[inked].mean()))
    return best


def _is_disc(body: np.ndarray) -> bool:
    height, width = body.shape
    if not 0.95 <= width / height <= 1.05:
        return False
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    disc = x**2 + y**2 <= 1
    return bool((disc & body).sum() / (disc | body).sum() > 0.95)

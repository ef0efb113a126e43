"""Emoji in ten drawing styles: vendor and split of each style, and readers for their icon and PNG packages."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from openvision.data.sources.picto.concepts import Concept, Concepts
from openvision.data.sources.picto.packages import Packages
from openvision.data.sources.picto.render import render_icon, render_png
from openvision.data.sources.picto.split import HELDOUT_STYLE, TRAIN, VALIDATION_STYLE
from openvision.errors import OpenVisionError
from openvision.files import JsonObject


@dataclass(frozen=True)
class Style:
    """One package of drawings; `name` is also the package's short name."""

    name: str
    vendor: str
    split: str
    look: str
    """Description of the style for captions, to follow a comma."""
    codes: str | None = None
    """Package whose chars.json gives the code points of the icons; None where icons are identified by name."""
    png_folder: str | None = None
    """Folder of PNGs; None for the SVGs of an icons.json."""
    without: str | None = None
    """Style of the same vendor whose emoji are left out here, because nearly all are the same drawings."""


# A vendor is in one split only: its styles resemble each other. EmojiOne is the validation vendor and Twitter the
# held-out one because both draw nearly every emoji with all skin tones, and neither derives from a training style.
STYLES = (
    Style("noto", "google", TRAIN, "drawn with soft shading", codes="noto"),
    Style("noto-v1", "google", TRAIN, "drawn with rounded shapes"),
    Style("google", "google", TRAIN, "drawn with soft shading", png_folder="img/google/64", without="noto"),
    Style("fluent-emoji", "microsoft", TRAIN, "in a glossy look with depth and gradients", codes="fluent-emoji-flat"),
    Style("fluent-emoji-flat", "microsoft", TRAIN, "in flat colours without outlines", codes="fluent-emoji-flat"),
    Style("openmoji", "openmoji", TRAIN, "in flat colours with black outlines", codes="openmoji"),
    Style("fxemoji", "mozilla", TRAIN, "in simple flat shapes"),
    Style("emojione", "emojione", VALIDATION_STYLE, "in flat colours"),
    Style("emojione-v1", "emojione", VALIDATION_STYLE, "in flat colours"),
    Style("twitter", "twitter", HELDOUT_STYLE, "in flat colours", png_folder="img/twitter/64"),
)


@dataclass(frozen=True)
class EmojiDrawing:
    """A concept as one style draws it."""

    style: Style
    concept: Concept
    render: Callable[[int], np.ndarray]
    """Size in pixels -> uint8 (size, size, 3) on white; raises BadSampleError."""


def emoji_drawings(packages: Packages, concepts: Concepts, left_out: dict[str, Counter[str]]) -> Iterator[EmojiDrawing]:
    """Every drawing of every style; drawings without a concept are counted in `left_out`, style -> reason -> number."""
    drawn: dict[str, set[str]] = defaultdict(set)
    for style in STYLES:
        reasons = left_out.setdefault(style.name, Counter())
        read = _icons if style.png_folder is None else _pngs
        for concept, render in read(packages, style, concepts, reasons):
            if concept.hexcode in drawn[style.name]:
                reasons["a second drawing of one emoji"] += 1
            elif style.without and concept.hexcode in drawn[style.without]:
                reasons[f"also in {style.without}"] += 1
            else:
                drawn[style.name].add(concept.hexcode)
                yield EmojiDrawing(style, concept, render)


_Found = Iterator[tuple[Concept, Callable[[int], np.ndarray]]]


def _icons(packages: Packages, style: Style, concepts: Concepts, reasons: Counter[str]) -> _Found:
    """The icons of an icons.json: SVG bodies, each with its own view box or that of the set."""
    content = packages.read_object(style.name, "icons.json")
    codes: dict[str, list[str]] = defaultdict(list)
    if style.codes:
        for code, icon in packages.read_object(style.codes, "chars.json").items():
            codes[icon].append(code)
    aliases: dict[str, list[str]] = defaultdict(list)
    for alias, target in content.get("aliases", {}).items():
        # An alias that also rotates or mirrors is another image, not another name.
        if target.keys() == {"parent"}:
            aliases[target["parent"]].append(alias)
    for icon, drawing in content["icons"].items():
        found = [concept for code in codes[icon] if (concept := concepts.by_code(code))]
        concept = found[0] if found else concepts.by_names([icon, *aliases[icon]])
        if concept is None:
            reasons["no emoji of this name"] += 1
        else:
            yield concept, partial(render_icon, svg_of_icon(drawing, content, f"{style.name}: {icon}"))


def svg_of_icon(drawing: JsonObject, icons: JsonObject, what: str) -> str:
    """A complete SVG, its view box padded to a square."""
    box = [drawing.get(side, icons.get(side, default)) for side, default in _BOX.items()]
    if not all(isinstance(value, int | float) for value in box) or min(box[2:]) <= 0:
        raise OpenVisionError(f"{what} has the view box {box}; left, top, width and height must be numbers")
    left, top, width, height = box
    side = max(width, height)
    corner = f"{left - (side - width) / 2} {top - (side - height) / 2}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{corner} {side} {side}">{drawing["body"]}</svg>'
    )


_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


def _pngs(packages: Packages, style: Style, concepts: Concepts, reasons: Counter[str]) -> _Found:
    """PNGs named by code points."""
    prefix = f"{style.png_folder}/"
    for name, data in packages.members(style.name, lambda name: name.startswith(prefix) and name.endswith(".png")):
        concept = concepts.by_code(name.removeprefix(prefix).removesuffix(".png"))
        if concept is None:
            reasons["no emoji of these code points"] += 1
        else:
            yield concept, partial(render_png, data)

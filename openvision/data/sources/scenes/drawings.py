"""The same objects by another artist: glyphs of Google's Noto Emoji, from the packages of `picto`."""

import io
from pathlib import Path

from openvision.data.sources.picto.concepts import plain_hexcode
from openvision.data.sources.picto.emoji import svg_of_icon
from openvision.data.sources.picto.packages import Packages, committed_packages, default_folder
from openvision.data.sources.picto.render import render_glyph
from openvision.data.sources.scenes.objects import Kind
from openvision.data.sources.scenes.render import GLYPH
from openvision.errors import OpenVisionError
from openvision.images.decode import BadSampleError

STYLE = "noto"


def other_drawings(kinds: tuple[Kind, ...], folder: Path | None = None, offline: bool = False) -> dict[str, bytes]:
    """A PNG with transparency for the emoji of every kind.

    The package is read in `folder` (by default in the user's cache) and fetched into it when it is missing. Raises
    OpenVisionError when it cannot be fetched, or has no drawing of a kind.
    """
    packages = Packages(folder or default_folder(), committed_packages(), offline)
    icons = packages.read_object(STYLE, "icons.json")
    named = {plain_hexcode(code): icon for code, icon in packages.read_object(STYLE, "chars.json").items()}
    found = {}
    for kind in kinds:
        icon = named.get(plain_hexcode("-".join(f"{ord(character):x}" for character in kind.emoji)))
        drawing = icons["icons"].get(icon)
        if drawing is None:
            raise OpenVisionError(
                f"{packages.path(STYLE)} has no drawing of {kind.name!r}; remove it to fetch it again"
            )
        buffer = io.BytesIO()
        try:
            render_glyph(svg_of_icon(drawing, icons, f"{STYLE}: {icon}"), GLYPH).save(buffer, "PNG")
        except BadSampleError as error:
            raise OpenVisionError(f"{packages.path(STYLE)}: {kind.name!r} cannot be drawn: {error}") from error
        found[kind.emoji] = buffer.getvalue()
    return found

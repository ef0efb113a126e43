"""Texts of a scene: an alt-text as the web has them, a caption as a captioner writes it, a short human sentence.

- Alt-texts name one thing of the image, all of it, the printed word, or nothing; junk of web pages clings to them.
- Captions tell of everything in three to seven sentences, each of which stands alone (training draws one of them at a
  time); a stated share of the names in them is wrong, as captioners are.
"""

from dataclasses import dataclass

from openvision.data.sources.openmoji.captions import as_sentences, enumerated
from openvision.data.sources.scenes.objects import COLOURS, TEXTURES, Kind, number, with_article
from openvision.data.sources.scenes.scene import Draw, Group, Scene
from openvision.errors import OpenVisionError

_NOTHING = (
    "IMG_{k}.jpg",
    "untitled",
    "click to enlarge",
    "product image",
    "DSC0{k}",
    "thumbnail",
    "home page banner",
    "photo {k}",
    "see more",
    "image {k} of 12",
    "no description available",
)
_JUNK_BEHIND = (
    "stock photo",
    "free download",
    "clipart",
    "- image {k}",
    "high quality",
    "wallpaper",
    "royalty free vector",
    "| best price",
    "- pinterest",
    "png {k}x{k}",
    "for sale | shop online today",
    "photos and pictures, page {k}",
)
_JUNK_BEFORE = ("IMG {k}", "new!", "free", "top 10", "buy", "cheap", "hd")
_PLACES = {"middle": "in the middle", "left": "on the left", "right": "on the right"} | {
    place: f"at the {place}" for place in ("top", "bottom", "bottom left", "bottom right")
}


@dataclass(frozen=True)
class AltTexts:
    """What web alt-texts say of their image; the four shares sum to 1."""

    nothing: float = 0.2
    """File names and phrases of web pages."""
    word: float = 0.08
    """The printed word alone; where none is printed, one group is named."""
    one: float = 0.47
    """One group of objects, without its number."""
    everything: float = 0.25
    """All groups of objects."""
    junk: float = 0.6
    """Texts that carry words of web pages."""

    def __post_init__(self) -> None:
        names = ("that say nothing", "that are the word", "of one group", "of everything", "with junk")
        for name, share in zip(names, (*self.shares, self.junk), strict=True):
            if not 0 <= share <= 1:
                raise OpenVisionError(f"the share of alt-texts {name}, {share}, must be between 0 and 1")
        if abs(sum(self.shares) - 1) > 1e-6:
            raise OpenVisionError(
                f"the shares of alt-texts (nothing {self.nothing}, word {self.word}, one {self.one}, everything "
                f"{self.everything}) must sum to 1, not {sum(self.shares):g}; change the others too"
            )

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """Nothing, word, one, everything."""
        return self.nothing, self.word, self.one, self.everything


def alt_text(scene: Scene, mix: AltTexts, draw: Draw) -> str:
    """What a web page says of this image."""
    digits = int(draw.between(100, 9999))
    said = ("nothing", "word", "one", "everything")[draw.weighted(mix.shares)]
    if said == "nothing":
        return draw.one(_NOTHING).format(k=digits)
    if said == "word" and scene.word is not None:
        text = scene.word.text.lower()
    elif said == "everything":
        text = " ".join(group.kind.named(group.count) for group in scene.groups)
    else:
        group = draw.one(scene.groups)
        text = group.kind.named(group.count)
    if draw.chance(mix.junk):
        if draw.chance(0.3):
            text = f"{draw.one(_JUNK_BEFORE).format(k=digits)} {text}"
        for junk in draw.some(_JUNK_BEHIND, 1 + draw.weighted((0.5, 0.3, 0.2))):
            text = f"{text} {junk.format(k=digits)}"
    return text


def short_text(scene: Scene, draw: Draw) -> str:
    """One sentence as a person would search for the image: the objects, and at times the word or the colour."""
    named = enumerated([group.kind.counted(group.count) for group in draw.some(scene.groups, len(scene.groups))])
    endings = [""]
    if scene.word is not None:
        endings.append(f" and the word {scene.word.text.lower()}")
    colour = f" on {with_article(scene.colour)} background"
    return named + draw.one((*endings, colour))


def synthetic_caption(scene: Scene, error_rate: float, kinds: tuple[Kind, ...], draw: Draw) -> str:
    """Three to seven sentences about the whole scene; each name, colour or number is wrong with `error_rate`."""
    told = _misread(scene, error_rate, kinds, draw)
    first, *rest = [_whole(told, draw), *_groups(told, draw), _background(told, draw), *_word(told, draw)]
    if len(told.groups) > 1:
        rest.append(_number(told))
    rest = draw.some(rest, len(rest))[:6]
    return as_sentences([first, *rest])


def _misread(scene: Scene, rate: float, kinds: tuple[Kind, ...], draw: Draw) -> Scene:
    """The scene as a captioner sees it: each fact is mistaken with this probability."""
    groups = tuple(
        Group(
            draw.one(kinds) if draw.chance(rate) else group.kind,
            draw.one((1, 2, 3)) if draw.chance(rate) else group.count,
            *(group.place, group.size, group.x, group.y, group.width, group.height),
        )
        for group in scene.groups
    )
    colour = draw.one(tuple(COLOURS)) if draw.chance(rate) else scene.colour
    return Scene(groups, colour, scene.texture, scene.word, scene.aspect)


def _whole(scene: Scene, draw: Draw) -> str:
    parts = [f"{group.kind.counted(group.count)} {_PLACES[group.place]}" for group in scene.groups]
    begin = draw.one(("the image shows", _there_is(scene.groups[0]), "a picture of"))
    return f"{begin} {enumerated(parts)} on {_ground(scene)}"


def _there_is(group: Group) -> str:
    return "there is" if group.count == 1 else "there are"


def _groups(scene: Scene, draw: Draw) -> list[str]:
    """A sentence for each group: its size and place, or where it is from another group."""
    sentences = []
    for index, group in enumerate(scene.groups):
        named = group.kind.counted(group.count)
        verb = "is" if group.count == 1 else "are"
        others = [other for other in range(len(scene.groups)) if other != index]
        if others and draw.chance(0.6):
            other = draw.one(others)
            neighbour = scene.groups[other]
            sentences.append(f"{named} {verb} {scene.relation(index, other)} {neighbour.kind.counted(neighbour.count)}")
        elif group.size != "medium" and draw.chance(0.7):
            sentences.append(f"the {group.kind.named(group.count)} {_PLACES[group.place]} {verb} {group.size}")
        else:
            sentences.append(f"{_there_is(group)} {named} {_PLACES[group.place]} of the image")
    return sentences


def _ground(scene: Scene) -> str:
    texture = "" if scene.texture == TEXTURES[0] else f"{scene.texture} "
    return f"{with_article(f'{texture}{scene.colour}')} background"


def _background(scene: Scene, draw: Draw) -> str:
    texture = "" if scene.texture == TEXTURES[0] else f" and {scene.texture}"
    subject = enumerated([group.kind.named(group.count) for group in scene.groups])
    return draw.one(
        (f"the background is {scene.colour}{texture}", f"behind the {subject} everything is {scene.colour}")
    )


def _word(scene: Scene, draw: Draw) -> list[str]:
    if scene.word is None:
        return []
    text, group = scene.word.text.lower(), draw.one(scene.groups)
    where = f"{scene.word.place} the {group.kind.named(group.count)}"
    forms = (f"the word {text} is printed {where}", f"a sign {where} says {text}", f"it says {text} in large letters")
    return [draw.one(forms)]


def _number(scene: Scene) -> str:
    total = sum(group.count for group in scene.groups)
    return f"there are {number(total)} objects of {number(len(scene.groups))} kinds"

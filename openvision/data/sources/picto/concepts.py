"""Concepts: every emoji with one name, whatever a vendor calls it.

Vendors name their files by code points, by current names, by former names or by Unicode's. All are mapped to the emoji
of emojibase-data, so that a concept has the same name in every style.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from openvision.data.sources.openmoji.names import EmojiName, clean_name
from openvision.data.sources.picto.packages import Packages
from openvision.files import JsonObject

_SHORTCODES = ("cldr", "emojibase", "emojibase-legacy", "github", "iamcal", "joypixels")
_COMPONENT = "component"
# Vendors' prefix of flags, absent from current names.
_FLAG_PREFIX = re.compile(r"^flag-for-(flag-)?")
# Two letters are the code of a country.
_WORD = re.compile(r"[a-z][a-z' -]{2,}")


@dataclass(frozen=True)
class Concept:
    """An emoji with its name, group, tags and keywords."""

    hexcode: str
    """Code points in hexadecimal without variation selectors, e.g. 1f469-200d-1f52c."""
    name: EmojiName
    group: str
    """One of Unicode's groups, e.g. "animals & nature"."""
    tags: tuple[str, ...]
    """Words of Unicode's annotations, true of the emoji."""
    keywords: tuple[str, ...]
    """Search words: related, not always true."""

    @property
    def concept(self) -> str:
        """The name without skin tones."""
        return self.name.bare

    @cached_property
    def family(self) -> str:
        """The role that a man, woman and person share; else the name without skin tones."""
        return self.name.role if self.name.gender and self.name.role else self.name.bare


class Concepts:
    """All emoji, looked up by code points or by any of their names."""

    def __init__(self, concepts: Iterable[Concept], names: Iterable[tuple[str, str]]) -> None:
        """`names` are pairs of (another name, code points); a name that several emoji share is ignored."""
        self.by_hexcode = {concept.hexcode: concept for concept in concepts}
        self._by_name = {_squeezed(concept.name.text): concept for concept in self.by_hexcode.values()}
        others: dict[str, set[str]] = defaultdict(set)
        for name, hexcode in names:
            others[_squeezed(name)].add(plain_hexcode(hexcode))
        for name, hexcodes in others.items():
            if len(hexcodes) == 1 and (concept := self.by_hexcode.get(next(iter(hexcodes)))):
                self._by_name.setdefault(name, concept)

    def by_code(self, hexcode: str) -> Concept | None:
        """The emoji of these code points, with or without variation selectors, in upper or lower case."""
        return self.by_hexcode.get(plain_hexcode(hexcode))

    def by_names(self, names: Iterable[str]) -> Concept | None:
        """The emoji of the first known one of these names."""
        for name in names:
            if concept := self._by_name.get(_squeezed(_FLAG_PREFIX.sub("flag-", name))):
                return concept
        return None


def read_concepts(packages: Packages) -> Concepts:
    """All emoji with names, groups, tags and keywords, from the packages emojibase and emojilib."""
    groups = {row["order"]: row for row in packages.read_object("emojibase", "en/messages.json")["groups"]}
    keywords = packages.read_object("emojilib", "dist/emoji-en-US.json")
    concepts: dict[str, Concept] = {}
    for row in packages.read_list("emojibase", "en/data.json"):
        group = groups.get(row.get("group"))
        if group is None or group["key"] == _COMPONENT:
            continue
        for variant in (row, *row.get("skins", ())):
            concept = _concept(variant, row, group["message"], keywords)
            # Of two emoji with one name the first is kept: a name must be unambiguous.
            concepts.setdefault(concept.name.text, concept)
    return Concepts(concepts.values(), _other_names(packages))


def _concept(variant: JsonObject, row: JsonObject, group: str, keywords: Mapping[str, list[str]]) -> Concept:
    name = clean_name(variant["emoji"], readable(variant["label"]))
    words = keywords.get(row["emoji"]) or keywords.get(row["emoji"].replace("\ufe0f", "")) or []
    return Concept(
        hexcode=plain_hexcode(variant["hexcode"]),
        name=name,
        group=group,
        tags=_useful(row.get("tags", ()), name),
        # The first keyword is the name with underscores.
        keywords=_useful(words[1:], name),
    )


def readable(label: str) -> str:
    """Remove punctuation ("woman scientist: dark skin tone") and spell out keycaps."""
    label = label.replace("keycap: #", "keycap hash").replace("keycap: *", "keycap asterisk")
    return " ".join(re.sub(r"[:,“”!.()]", " ", label.replace("&", "and")).split())


def _useful(words: Iterable[str], name: EmojiName) -> tuple[str, ...]:
    """Plain words that are not in the name already."""
    lower = [word.lower() for word in words]
    return tuple(dict.fromkeys(word for word in lower if _WORD.fullmatch(word) and word not in name.text))


def _other_names(packages: Packages) -> Iterable[tuple[str, str]]:
    """Pairs of a former or short name and code points."""
    for row in packages.read_list("google", "emoji.json"):
        if row["name"]:
            yield row["name"], row["unified"]
    for vendor in _SHORTCODES:
        for hexcode, names in packages.read_object("emojibase", f"en/shortcodes/{vendor}.json").items():
            for name in [names] if isinstance(names, str) else names:
                yield name, hexcode


def plain_hexcode(hexcode: str) -> str:
    """Lower case, without leading zeros and variation selectors, which vendors use inconsistently."""
    return "-".join(part.lstrip("0") or "0" for part in hexcode.lower().split("-") if part != "fe0f")


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("&", "and"))

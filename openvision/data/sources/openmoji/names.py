"""Names of emoji, parsed: gender, role, skin tones, hair, direction, country, kind."""

import re
from dataclasses import dataclass
from functools import cached_property

_TONE = re.compile(r"\b(medium-light|medium-dark|light|medium|dark) skin tone\b")
_HAIR = re.compile(r"\b((?:blond|red|curly|white) hair|bald|beard)\b")
# Not "woman's boot", which shows no woman.
_GENDER = re.compile(r"\b(man|woman|person|men|women|people)\b(?!')")
_NO_PERSON = re.compile(r"'s\b|\b(mark|shirt|shoe|symbol)\b")
_PERSON_FIRST = (0x1F468, 0x1F469, 0x1F9D1)
_DIRECTION = "facing right"
_PEOPLE = re.compile(
    r"\b(man|woman|person|men|women|people|boy|girl|child|baby|adult|prince|princess|santa|claus|mrs|mother|father|"
    r"angel|mage|fairy|vampire|merman|mermaid|merperson|elf|genie|zombie|troll|superhero|supervillain|guard|detective|"
    r"ninja|family|couple|kiss|dancer|walking|running|surfing|swimming|biking|snowboarder|skier|breast-feeding|bride)\b"
)
_BODY = re.compile(
    r"\b(hand|hands|finger|fingers|fist|thumbs|palm|palms|index|ear|nose|foot|leg|muscle|biceps|handshake|nail|salute|"
    r"horns|gesture|pinching|waving|writing|clapping|call me|eye|eyes|tongue|mouth|tooth|brain|lungs|bone)\b"
)

# Ranges of first code points whose emoji are all of one kind; whatever is in no range is a thing.
_KINDS: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = (
    (
        "animal",
        (
            (0x1F400, 0x1F43C),
            (0x1F43F, 0x1F43F),
            (0x1F54A, 0x1F54A),
            (0x1F577, 0x1F577),
            (0x1F980, 0x1F9A9),
            (0x1F9AB, 0x1F9AE),
            (0x1FAB0, 0x1FAB3),
            (0x1FABC, 0x1FABC),
            (0x1FABF, 0x1FABF),
            (0x1FACE, 0x1FACF),
        ),
    ),
    (
        "food",
        (
            (0x1F32D, 0x1F330),
            (0x1F336, 0x1F336),
            (0x1F33D, 0x1F33D),
            (0x1F345, 0x1F373),
            (0x1F375, 0x1F37C),
            (0x1F37F, 0x1F37F),
            (0x1F950, 0x1F961),
            (0x1F963, 0x1F96F),
            (0x1F9C0, 0x1F9C9),
            (0x1F9CB, 0x1F9CB),
            (0x1FAD0, 0x1FADC),
        ),
    ),
    ("plant", ((0x1F331, 0x1F335), (0x1F337, 0x1F33C), (0x1F33E, 0x1F343))),
    (
        "face",
        (
            (0x1F600, 0x1F644),
            (0x1F910, 0x1F917),
            (0x1F920, 0x1F925),
            (0x1F927, 0x1F92F),
            (0x1F970, 0x1F976),
            (0x1F978, 0x1F97A),
            (0x1F9D0, 0x1F9D0),
            (0x1FAE0, 0x1FAE9),
            (0x2639, 0x263A),
        ),
    ),
    ("vehicle", ((0x1F680, 0x1F68E), (0x1F690, 0x1F6A2), (0x1F6A4, 0x1F6A4), (0x1F6F4, 0x1F6F6), (0x1F6FA, 0x1F6FB))),
    ("building", ((0x1F3DB, 0x1F3DB), (0x1F3DF, 0x1F3ED), (0x1F3EF, 0x1F3F0))),
)


@dataclass(frozen=True)
class EmojiName:
    """A clean, unique name, e.g. "woman scientist dark skin tone", and its parts."""

    text: str
    emoji: str

    @cached_property
    def tones(self) -> tuple[str, ...]:
        """Skin tones in order of appearance."""
        return tuple(_TONE.findall(self.text))

    @cached_property
    def bare(self) -> str:
        """The name without skin tones."""
        return " ".join(_TONE.sub("", self.text).split())

    @cached_property
    def gender(self) -> str | None:
        """man, woman, person or a plural, when the name is about one such word; None for couples and things."""
        found = _GENDER.findall(self.bare)
        return found[0] if len(found) == 1 else None

    @cached_property
    def hair(self) -> str | None:
        """Hair, baldness or beard."""
        found = _HAIR.search(self.bare)
        return found[1] if found else None

    @property
    def faces_right(self) -> bool:
        """Whether the figure faces right."""
        return self.text.endswith(_DIRECTION) or f"{_DIRECTION} " in self.text

    @cached_property
    def role(self) -> str:
        """The bare name without gender, hair and direction: an occupation, an activity, a look."""
        rest = _HAIR.sub("", self.bare).replace(_DIRECTION, "")
        if self.gender:
            rest = re.sub(rf"\b{self.gender}\b", "", rest)
        return " ".join(rest.split())

    @cached_property
    def country(self) -> str | None:
        """Country or region of a flag."""
        return self.text.removeprefix("flag ") if _is_country_flag(self.emoji) else None

    @cached_property
    def kind(self) -> str:
        """flag, clock, body, person, animal, food, plant, face, vehicle, building, sign or thing."""
        if self.country:
            return "flag"
        if re.search(r"o.clock|-thirty", self.text):
            return "clock"
        first = ord(self.emoji[0])
        for kind, ranges in _KINDS:
            if not self.tones and any(low <= first <= high for low, high in ranges):
                return kind
        if first in _PERSON_FIRST or (_PEOPLE.search(self.bare) and not _NO_PERSON.search(self.bare)):
            return "person"
        if self.tones:
            return "body" if _BODY.search(self.bare) else "person"
        return "sign" if re.search(r"\b(button|arrow|keycap)\b", self.text) else "thing"


def clean_name(emoji: str, english: str) -> EmojiName:
    """Parse ":woman_scientist_dark_skin_tone:"; flags of countries get the word "flag" in front."""
    text = " ".join(english.strip(":").replace("_", " ").replace("’", "'").lower().split())
    return EmojiName(f"flag {text}" if _is_country_flag(emoji) and not text.startswith("flag ") else text, emoji)


def _is_country_flag(emoji: str) -> bool:
    """Two regional indicators, or the black flag followed by the tags of a subdivision."""
    return 0x1F1E6 <= ord(emoji[0]) <= 0x1F1FF or (emoji[0] == "\U0001f3f4" and len(emoji) > 5)

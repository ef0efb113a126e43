"""Questions about a drawn image: what it is, its colour, how many people, which country's flag, is there a ...?

Answers come from the image's name and from measurements of its pixels, never from its synthetic caption. A question is
not asked when the name leaves its answer open (how many people shake these hands?).
"""

import re
from dataclasses import dataclass

from openvision.data.sources.openmoji.attributes import VisualAttributes
from openvision.data.sources.openmoji.names import EmojiName

NAME, COLOUR, SKIN, PEOPLE, COUNTRY, YES_NO = "what", "colour", "skin", "people", "country", "yes/no"
OPEN = (NAME, COLOUR, SKIN, PEOPLE, COUNTRY)
_TWO = re.compile(r"\b(kiss|couple|holding hands|men|women|people|twins|wrestling|wrestlers)\b")
_FAMILY = re.compile(r"^family\b")
_MEMBERS = re.compile(r"\b(man|woman|boy|girl|adult|child)\b")
_NUMBERS = ("zero", "one", "two", "three", "four")
_KINDS = {
    "animal": "an animal",
    "food": "food",
    "plant": "a plant",
    "face": "a face",
    "vehicle": "a vehicle",
    "building": "a building",
    "clock": "a clock",
    "sign": "a sign",
    "flag": "a flag",
    "person": "a person",
}
# Kinds whose names do not tell whether the image shows a person.
_MAYBE_PERSON = ("body", "face")
_MAN, _WOMAN = (
    re.compile(r"\b(man|men|boy|prince|father|santa|merman)\b"),
    re.compile(r"\b(woman|women|girl|princess|mother|mermaid|mrs|bride)\b"),
)


@dataclass(frozen=True)
class Asked:
    """A question and its answer."""

    kind: str
    question: str
    answer: str

    @property
    def topic(self) -> str | None:
        """Questions of one topic give away each other's answers; None for independent questions."""
        if self.kind in (NAME, COUNTRY) or self.question.startswith("Is it "):
            return NAME
        return SKIN if "skin" in self.question else None


def open_questions(name: EmojiName, measured: VisualAttributes) -> list[Asked]:
    """All open questions with exactly one true answer."""
    asked = [Asked(NAME, "What is this?", plain(name.bare))]
    if name.country:
        asked.append(Asked(COUNTRY, "Which country is it?", plain(name.country)))
    if measured.filled:
        asked.append(Asked(COLOUR, "What colour is it?", measured.colours[0]))
    if len(set(name.tones)) == 1:
        asked.append(Asked(SKIN, "How dark is the skin?", name.tones[0]))
    people = count_people(name)
    if people is not None:
        asked.append(Asked(PEOPLE, "How many people?", _NUMBERS[people]))
    return asked


def describe(name: EmojiName, measured: VisualAttributes) -> str:
    """A caption with all that the questions ask for: woman judge, one person, dark skin, black."""
    people = count_people(name)
    parts = [plain(name.bare), plain(name.country or "")]
    if people:
        parts.append(f"{_NUMBERS[people]} {'person' if people == 1 else 'people'}")
    else:
        parts.append(_KINDS.get(name.kind, ""))
    if len(set(name.tones)) == 1:
        parts.append(f"{name.tones[0]} skin")
    if measured.filled:
        parts.append(measured.colours[0])
    return ", ".join(part for part in parts if part)


def count_people(name: EmojiName) -> int | None:
    """Number of people in an image; None when its name leaves it open."""
    if name.kind in _MAYBE_PERSON or (name.kind == "thing" and name.tones):
        return None
    if name.kind != "person":
        return 0
    if _FAMILY.search(name.text):
        members = len(_MEMBERS.findall(name.text))
        return members if 2 <= members < len(_NUMBERS) else None
    if _TWO.search(name.bare) or len(name.tones) == 2:
        return 2
    return 1 if name.gender in ("man", "woman", "person") else None


def present(name: EmojiName) -> frozenset[str]:
    """Yes-or-no questions whose answer is yes."""
    found = {_is_there(name.kind)} if name.kind in _KINDS else set()
    if name.kind == "person":
        found |= {"Is there a woman?"} if _WOMAN.search(name.bare) else set()
        found |= {"Is there a man?"} if _MAN.search(name.bare) else set()
    if len(set(name.tones)) == 1:
        found.add(f"Is the skin {name.tones[0]}?")
    return frozenset(found | {_is_this(name)})


def may_ask(question: str, name: EmojiName) -> bool:
    """Whether "no" is a true and clear answer to `question` for an image in which it is not `present`."""
    if question.startswith("Is the skin"):
        return len(set(name.tones)) == 1
    if question == "Is there a person?":
        return name.kind not in (*_MAYBE_PERSON, "person")
    if question in ("Is there a woman?", "Is there a man?"):
        # Open for body parts, and for people without a gender.
        return name.kind not in ("person", *_MAYBE_PERSON) or name.gender in ("man", "woman", "men", "women")
    return True


def _is_there(kind: str) -> str:
    return f"Is there {_KINDS[kind]}?"


def _is_this(name: EmojiName) -> str:
    return f"Is it {plain(name.bare)}?"


def plain(text: str) -> str:
    """Lower case without punctuation, the form of all answers."""
    return " ".join(re.sub(r"[^\w\s'-]", "", text.replace("&", "and")).lower().split())

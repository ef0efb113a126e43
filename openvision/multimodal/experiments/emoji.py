"""Questions about a drawn emoji: what it is, its colour, how many people, which country's flag, is there a ...?

Answers come from the image's name and from measurements of its pixels, never from its synthetic caption. A question is
not asked when the name leaves its answer open (how many people shake these hands?).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from openvision.data.shards.dataset import Sample
from openvision.data.sources.openmoji.attributes import VisualAttributes, measure
from openvision.data.sources.openmoji.names import EmojiName
from openvision.data.sources.openmoji.split import COMPOSITIONAL, RANDOM
from openvision.images.decode import decode_image
from openvision.multimodal.experiments.demo_data import Asked, DemoOptions, Source, even, paired, pairs_of

NAME, COLOUR, SKIN, PEOPLE, COUNTRY = "what", "colour", "skin", "people", "country"
OPEN = (NAME, COLOUR, SKIN, PEOPLE, COUNTRY)
_TWO = re.compile(r"\b(kiss|couple|holding hands|men|women|people|twins|wrestling|wrestlers)\b")
_FAMILY = re.compile(r"^family\b")
_MEMBERS = re.compile(r"\b(man|woman|boy|girl|adult|child)\b")
# How often a topic has a "yes" question rather than a "no" question and the open one; balances yes and no.
_YES_SHARE = 0.42
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
class Emoji:
    """The name of an emoji and the measurements of its pixels."""

    name: EmojiName
    measured: VisualAttributes


def topic_of(asked: Asked) -> str | None:
    """Questions of one topic give away each other's answers; None for independent questions."""
    if asked.kind in (NAME, COUNTRY) or asked.question.startswith("Is it "):
        return NAME
    return SKIN if "skin" in asked.question else None


def read_emoji(sample: Sample) -> Emoji:
    """What the shards say of an emoji, and what its pixels do."""
    # Shards of other sources have no emoji.
    name = EmojiName(str(sample.meta["name"]), str(sample.meta.get("emoji") or " "))
    return Emoji(name, measure(decode_image(sample.image)))


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


def _polar(images: Sequence[Emoji], generator: random.Random, most: int | None = None) -> list[list[Asked]]:
    return paired(
        [present(image.name) for image in images],
        lambda question, index: may_ask(question, images[index].name),
        generator,
        most,
    )


def converse(images: Sequence[Emoji], options: DemoOptions, generator: random.Random) -> list[list[Asked]]:
    """The questions of one conversation about each image."""
    polar = _polar(images, generator, options.pairs)
    return [
        _choose(open_questions(image.name, image.measured), polar[index], options.turns, generator)
        for index, image in enumerate(images)
    ]


def _choose(open_: list[Asked], polar: list[Asked], turns: int, generator: random.Random) -> list[Asked]:
    """Up to `turns` questions in random order, none of which gives away the answer to a later one.

    On a topic, it asks either a question with the answer yes, which gives the topic away, or one with the answer no and
    then the open one.
    """
    blocks: list[list[Asked]] = []
    for topic in (NAME, SKIN):
        said_yes = [one for one in polar if topic_of(one) == topic and one.answer == "yes"]
        said_no = [one for one in polar if topic_of(one) == topic and one.answer == "no"]
        asked = [one for one in open_ if topic_of(one) == topic]
        if said_yes and generator.random() < _YES_SHARE:
            blocks.append([generator.choice(said_yes)])
        elif asked:
            blocks.append([*generator.sample(said_no, min(1, len(said_no))), generator.choice(asked)])
    alone = [[one] for one in (*open_, *polar) if topic_of(one) is None and not _is_dull(one, generator)]
    generator.shuffle(alone)
    blocks += alone[: max(0, turns - sum(map(len, blocks)))]
    generator.shuffle(blocks)
    return [one for block in blocks for one in block]


def _is_dull(asked: Asked, generator: random.Random) -> bool:
    """Skip half of the questions for the number of people when there are none, because most images show none."""
    return asked.kind == PEOPLE and asked.answer == "zero" and generator.random() < 0.5


def examine(images: Sequence[Emoji], options: DemoOptions, generator: random.Random) -> list[tuple[int, Asked]]:
    """Single questions: balanced yes-or-no ones, and open ones balanced over kinds and, for counts, answers."""
    return [*_balanced(images, options.yes_no, generator), *_spread(images, options.open_, generator)]


def _balanced(images: Sequence[Emoji], most: int, generator: random.Random) -> list[tuple[int, Asked]]:
    """Pairs of one yes and one no to the same text, sampled with fixed shares of the topics."""
    pairs: dict[str | None, list[tuple[tuple[int, Asked], tuple[int, Asked]]]] = {None: [], SKIN: [], NAME: []}
    for pair in pairs_of(_polar(images, generator)):
        pairs[topic_of(pair[0][1])].append(pair)
    # Half ask for a kind or a gender, a quarter for the skin, a quarter for the name.
    shares = {None: most // 4, SKIN: most // 8, NAME: most // 8}
    picked = [generator.sample(pairs[topic], min(share, len(pairs[topic]))) for topic, share in shares.items()]
    return [one for group in picked for pair in group for one in pair]


def _spread(images: Sequence[Emoji], most: int, generator: random.Random) -> list[tuple[int, Asked]]:
    by_kind: dict[str, list[tuple[int, Asked]]] = {kind: [] for kind in OPEN}
    for index, image in enumerate(images):
        for asked in open_questions(image.name, image.measured):
            by_kind[asked.kind].append((index, asked))
    by_kind[PEOPLE] = even(by_kind[PEOPLE], generator)
    share = most // (len(OPEN) - 1)
    # There are few flags; the other kinds share the rest evenly.
    return [
        one
        for kind, found in by_kind.items()
        for one in generator.sample(found, min(share if kind != COUNTRY else share // 4, len(found)))
    ]


EMOJI = Source(
    "openvision data openmoji",
    (COMPOSITIONAL, RANDOM),
    read_emoji,
    lambda image: describe(image.name, image.measured),
    converse,
    examine,
)
"""Single emoji."""

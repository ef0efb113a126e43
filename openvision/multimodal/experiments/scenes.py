"""Questions about a composed scene: what, how many, where, which background, what does the sign say, is there a ...?

Answers come from the description that `openvision data scenes` writes beside every scene, never from a caption.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from openvision.data.shards.dataset import Sample
from openvision.data.sources.scenes.objects import Kind, kinds, number
from openvision.data.sources.scenes.scene import COMBINATIONS
from openvision.errors import OpenVisionError
from openvision.multimodal.experiments.demo_data import Asked, DemoOptions, Source, even, paired, pairs_of

WHAT, COUNT, WHERE, COLOUR, WORD = "what", "how many", "where", "background", "sign"
OPEN = (WHAT, COUNT, WHERE, COLOUR, WORD)
_SIGN = "Is there a sign?"
# Objects of a kind get one question in a conversation, because each answer gives away another one: one of these, or
# whether they are there.
_ASKED = {WHAT: 0.35, COUNT: 0.2, WHERE: 0.15}
_IS_THERE = 1 - sum(_ASKED.values())
_KINDS = {kind.name: kind for kind in kinds()}


@dataclass(frozen=True)
class Objects:
    """Objects of one kind in a scene."""

    kind: Kind
    count: int
    place: str

    @property
    def is_there(self) -> str:
        """The yes-or-no question for them."""
        return f"Is there {self.kind.counted(1)}?"


@dataclass(frozen=True)
class SceneFacts:
    """What is in a scene."""

    groups: tuple[Objects, ...]
    background: str
    word: str | None
    """The printed word, in lower case."""


def read_scene(sample: Sample) -> SceneFacts:
    """What the shards say of a scene; raises OpenVisionError where they say nothing."""
    try:
        scene = sample.meta["scene"]
        groups = tuple(
            Objects(_KINDS[group["kind"]], int(group["count"]), str(group["place"])) for group in scene["groups"]
        )
        word = scene["word"]
        return SceneFacts(groups, str(scene["background"]["colour"]), str(word["text"]).lower() if word else None)
    except (TypeError, KeyError, ValueError) as error:
        raise OpenVisionError(
            f"sample {sample.key} has no description of a scene; make the images with `openvision data scenes`"
        ) from error


def describe(scene: SceneFacts) -> str:
    """A caption with all that the questions ask for: two wolves left, an owl right, blue background, sign sale."""
    parts = [f"{group.kind.counted(group.count)} {group.place}" for group in scene.groups]
    parts.append(f"{scene.background} background")
    return ", ".join([*parts, f"sign {scene.word}"] if scene.word else parts)


def of_objects(group: Objects, alone: bool) -> dict[str, Asked]:
    """The open questions about objects of one kind, by what is asked."""
    what = "What is this?" if alone else f"What is {_at(group.place)}?"
    asked = {
        WHAT: Asked(WHAT, what, group.kind.name),
        COUNT: Asked(COUNT, f"How many {group.kind.plural}?", number(group.count)),
    }
    if not alone:
        verb = "is" if group.count == 1 else "are"
        asked[WHERE] = Asked(WHERE, f"Where {verb} the {group.kind.named(group.count)}?", group.place)
    return asked


def of_scene(scene: SceneFacts) -> list[Asked]:
    """The open questions about the rest of it."""
    asked = [Asked(COLOUR, "Which colour is the background?", scene.background)]
    return [*asked, Asked(WORD, "What does the sign say?", scene.word)] if scene.word else asked


def _at(place: str) -> str:
    if place in ("left", "right"):
        return f"on the {place}"
    return "in the middle" if place == "middle" else f"at the {place}"


def present(scene: SceneFacts) -> frozenset[str]:
    """Yes-or-no questions whose answer is yes."""
    found = {group.is_there for group in scene.groups} | {f"Is the background {scene.background}?"}
    return frozenset(found | {_SIGN} if scene.word else found)


def _polar(images: Sequence[SceneFacts], generator: random.Random, most: int | None = None) -> list[list[Asked]]:
    # The description of a scene is complete: what it does not name is not there.
    return paired([present(image) for image in images], lambda question, index: True, generator, most)


def converse(images: Sequence[SceneFacts], options: DemoOptions, generator: random.Random) -> list[list[Asked]]:
    """The questions of one conversation about each image."""
    polar = _polar(images, generator, options.pairs)
    return [_choose(image, polar[index], options.turns, generator) for index, image in enumerate(images)]


def _choose(scene: SceneFacts, polar: list[Asked], turns: int, generator: random.Random) -> list[Asked]:
    """Up to `turns` questions in random order, none of which gives away the answer to another one."""
    chosen: list[Asked] = []
    for group in scene.groups:
        choice = [(asked, _ASKED[kind]) for kind, asked in of_objects(group, len(scene.groups) == 1).items()]
        choice += [(one, _IS_THERE) for one in polar if one.question == group.is_there]
        chosen += generator.choices([one for one, _ in choice], [weight for _, weight in choice])
    colour, *word = of_scene(scene)
    absent = [one for one in polar if one.answer == "no" and not _is_of_scene(one)]
    of_colour = [colour, *(one for one in polar if "background" in one.question)]
    of_word = [*word, *(one for one in polar if one.question == _SIGN)]
    # As many are asked for that are not there.
    if generator.random() < _IS_THERE * len(scene.groups):
        chosen += generator.sample(absent, min(1, len(absent)))
    for choice in (of_colour, of_word):
        chosen += generator.sample(choice, min(1, len(choice)))
    generator.shuffle(chosen)
    return chosen[:turns]


def _is_of_scene(asked: Asked) -> bool:
    return asked.question == _SIGN or "background" in asked.question


def examine(images: Sequence[SceneFacts], options: DemoOptions, generator: random.Random) -> list[tuple[int, Asked]]:
    """Single questions: balanced yes-or-no ones, two of three for objects, and open ones balanced over kinds."""
    pairs = list(pairs_of(_polar(images, generator)))
    of_objects_, of_scene_ = (
        [pair for pair in pairs if _is_of_scene(pair[0][1]) is of_scene] for of_scene in (False, True)
    )
    polar = [
        *generator.sample(of_objects_, min(options.yes_no // 3, len(of_objects_))),
        *generator.sample(of_scene_, min(options.yes_no // 6, len(of_scene_))),
    ]
    by_kind: dict[str, list[tuple[int, Asked]]] = {kind: [] for kind in OPEN}
    for index, image in enumerate(images):
        for group in image.groups:
            for kind, asked in of_objects(group, len(image.groups) == 1).items():
                by_kind[kind].append((index, asked))
        for asked in of_scene(image):
            by_kind[asked.kind].append((index, asked))
    by_kind[COUNT] = even(by_kind[COUNT], generator)
    share = options.open_ // len(OPEN)
    spread = (generator.sample(found, min(share, len(found))) for found in by_kind.values())
    return [one for pair in polar for one in pair] + [one for found in spread for one in found]


SCENES = Source("openvision data scenes", (COMBINATIONS,), read_scene, describe, converse, examine)
"""Composed scenes."""

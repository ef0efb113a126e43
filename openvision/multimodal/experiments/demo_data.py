"""Conversations about the pictures of shards, in LLaVA's format, and questions for their held-out splits.

    folder/images/SPLIT/KEY.png        the pictures
    folder/captions.json               a caption of every training picture
    folder/train.json                  conversations about the training pictures
    folder/SPLIT/questions.json        single questions about the pictures of validation and the held-out splits

For every text of a yes-or-no question as many pictures answer yes as no in each split, and nearly so in training. So a
model that sees no picture, and therefore gives one text one answer, is right exactly half the time.
"""

import io
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openvision.data.shards.dataset import ShardDataset
from openvision.data.sources.openmoji.attributes import VisualAttributes, measure
from openvision.data.sources.openmoji.names import EmojiName
from openvision.data.sources.openmoji.split import COMPOSITIONAL, RANDOM, TRAIN, VALIDATION
from openvision.errors import OpenVisionError
from openvision.files import atomic_folder, make_folder
from openvision.multimodal.experiments.demo_questions import (
    COUNTRY,
    NAME,
    OPEN,
    PEOPLE,
    SKIN,
    YES_NO,
    Asked,
    describe,
    may_ask,
    open_questions,
    present,
)
from openvision.multimodal.model.llm import IMAGE_TOKEN

CAPTIONS, CONVERSATIONS, QUESTIONS = "captions.json", "train.json", "questions.json"
SPLITS = (VALIDATION, COMPOSITIONAL, RANDOM)
_STAMP = "demo.json"
# How often a topic's "yes" is asked rather than its "no" and then the open question: yes and no come out even.
_YES_SHARE = 0.42
_VERSION = 3


@dataclass(frozen=True)
class DemoOptions:
    """How much is made."""

    turns: int = 8
    """Questions in a conversation."""
    rounds: int = 2
    """Conversations a training picture."""
    pairs: int = 600
    """Pictures of either answer that one text is asked of in a round, at most."""
    yes_no: int = 300
    """Yes-or-no questions a held-out split, at most."""
    open_: int = 300
    """Open questions a held-out split, at most."""
    seed: int = 0


@dataclass(frozen=True)
class Pictured:
    """A picture, its name and what was measured on it."""

    key: str
    file: str
    name: EmojiName
    measured: VisualAttributes


def make_demo_data(shards: Path, folder: Path, options: DemoOptions | None = None) -> Path:
    """Write conversations and questions about the splits of `shards` into `folder`, or find them made.

    Raises OpenVisionError when a split is missing or `folder` holds something else.
    """
    options = options or DemoOptions()
    stamp = {"version": _VERSION, "shards": str(shards.resolve()), **vars(options)}
    if (folder / _STAMP).is_file() and json.loads((folder / _STAMP).read_text()) == stamp:
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / _STAMP).is_file():
        raise OpenVisionError(f"{folder} holds other files; choose another folder for the demonstration's data")
    with atomic_folder(folder) as temporary:
        for split in (TRAIN, *SPLITS):
            pictured = list(_unpack(shards / split, temporary / "images" / split))
            generator = random.Random(f"{options.seed} {split}")
            if split == TRAIN:
                (temporary / CAPTIONS).write_text(json.dumps(captions(pictured), indent=1), encoding="utf-8")
                content: Any = conversations(pictured, options, generator)
                (temporary / CONVERSATIONS).write_text(json.dumps(content, indent=1), encoding="utf-8")
            else:
                content = questions(pictured, options, generator)
                (make_folder(temporary / split) / QUESTIONS).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (temporary / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    return folder


def _unpack(shards: Path, images: Path) -> Iterable[Pictured]:
    if not shards.is_dir():
        raise OpenVisionError(f"{shards} is missing; make the pictures with `openvision data openmoji`")
    for sample in ShardDataset(shards):
        # The folder around it appears when all is written, so single files need no care.
        file = make_folder(images) / f"{sample.key}.{sample.extension}"
        file.write_bytes(sample.image)
        with Image.open(io.BytesIO(sample.image)) as image:
            measured = measure(np.asarray(image.convert("RGB")))
        # Shards of other sources lack what a name is parsed from.
        emoji = str(sample.meta.get("emoji") or " ")
        yield Pictured(sample.key, f"{images.name}/{file.name}", EmojiName(str(sample.meta["name"]), emoji), measured)


def captions(pictured: Sequence[Pictured]) -> list[dict[str, Any]]:
    """A question for a caption, and the caption, in LLaVA's format, one row a picture."""
    asked = [Asked("caption", "Describe it.", describe(picture.name, picture.measured)) for picture in pictured]
    return [
        {"id": picture.key, "image": picture.file, "conversations": _turns(one, 0)}
        for picture, one in zip(pictured, asked, strict=True)
    ]


def conversations(pictured: Sequence[Pictured], options: DemoOptions, generator: random.Random) -> list[dict[str, Any]]:
    """Conversations in LLaVA's format, `rounds` a picture, each of up to `turns` questions."""
    rows = []
    for number in range(options.rounds):
        polar = _paired(pictured, generator, most=options.pairs)
        for index, picture in enumerate(pictured):
            chosen = _choose(open_questions(picture.name, picture.measured), polar[index], options.turns, generator)
            rows.append(
                {
                    "id": f"{picture.key}-{number}",
                    "image": picture.file,
                    "conversations": [turn for place, one in enumerate(chosen) for turn in _turns(one, place)],
                }
            )
    return rows


def _choose(open_: list[Asked], polar: list[Asked], turns: int, generator: random.Random) -> list[Asked]:
    """Up to `turns` questions in random order, of which none gives away a later one.

    On one topic there is either a question that is answered yes, which gives the topic away, or one that is answered no
    and then the open one.
    """
    blocks: list[list[Asked]] = []
    for topic in (NAME, SKIN):
        said_yes = [one for one in polar if one.topic == topic and one.answer == "yes"]
        said_no = [one for one in polar if one.topic == topic and one.answer == "no"]
        asked = [one for one in open_ if one.topic == topic]
        if said_yes and generator.random() < _YES_SHARE:
            blocks.append([generator.choice(said_yes)])
        elif asked:
            blocks.append([*generator.sample(said_no, min(1, len(said_no))), generator.choice(asked)])
    alone = [[one] for one in (*open_, *polar) if one.topic is None and not _is_dull(one, generator)]
    generator.shuffle(alone)
    blocks += alone[: max(0, turns - sum(map(len, blocks)))]
    generator.shuffle(blocks)
    return [one for block in blocks for one in block]


def _is_dull(asked: Asked, generator: random.Random) -> bool:
    """Half of the pictures without people are not asked how many there are: they are most pictures."""
    return asked.kind == PEOPLE and asked.answer == "zero" and generator.random() < 0.5


def _turns(asked: Asked, place: int) -> list[dict[str, str]]:
    mark = "" if place else f"{IMAGE_TOKEN}\n"
    return [{"from": "human", "value": mark + asked.question}, {"from": "gpt", "value": asked.answer}]


def _paired(pictured: Sequence[Pictured], generator: random.Random, most: int | None = None) -> list[list[Asked]]:
    """For every picture yes-or-no questions, each text asked of as many pictures that say yes as that say no.

    `most` pictures of either answer are asked a text.
    """
    holders: dict[str, list[int]] = defaultdict(list)
    for index, picture in enumerate(pictured):
        for question in present(picture.name):
            holders[question].append(index)
    asked: list[list[Asked]] = [[] for _ in pictured]
    for question in sorted(holders):
        have = set(holders[question])
        lack = [i for i, one in enumerate(pictured) if i not in have and may_ask(question, one.name)]
        count = min(len(have), len(lack), most or len(have))
        for answer, indices in (("yes", sorted(have)), ("no", lack)):
            for index in generator.sample(indices, count):
                asked[index].append(Asked(YES_NO, question, answer))
    return asked


def questions(pictured: Sequence[Pictured], options: DemoOptions, generator: random.Random) -> list[dict[str, str]]:
    """Single questions: balanced yes-or-no ones, and open ones spread over the kinds and, for counts, the answers."""
    chosen = [*_balanced(pictured, options.yes_no, generator), *_spread(pictured, options.open_, generator)]
    return [
        {
            "id": f"{number:04d}",
            "image": f"../images/{pictured[index].file}",
            "kind": asked.kind,
            "question": asked.question,
            "answer": asked.answer,
        }
        for number, (index, asked) in enumerate(chosen)
    ]


def _balanced(pictured: Sequence[Pictured], most: int, generator: random.Random) -> list[tuple[int, Asked]]:
    """Pairs of one yes and one no to the same text; texts take turns, so that frequent ones do not crowd out others."""
    by_text: dict[str, dict[str, list[tuple[int, Asked]]]] = defaultdict(lambda: {"yes": [], "no": []})
    for index, asked in enumerate(_paired(pictured, generator)):
        for one in asked:
            by_text[one.question][one.answer].append((index, one))
    pairs: dict[str | None, list[list[tuple[int, Asked]]]] = {None: [], SKIN: [], NAME: []}
    for question in sorted(by_text):
        for yes, no in zip(by_text[question]["yes"], by_text[question]["no"], strict=True):
            pairs[yes[1].topic].append([yes, no])
    # Half ask for a kind or a gender, a quarter for the skin, a quarter for the thing itself.
    shares = {None: most // 4, SKIN: most // 8, NAME: most // 8}
    picked = [generator.sample(pairs[topic], min(share, len(pairs[topic]))) for topic, share in shares.items()]
    return [one for group in picked for pair in group for one in pair]


def _spread(pictured: Sequence[Pictured], most: int, generator: random.Random) -> list[tuple[int, Asked]]:
    by_kind: dict[str, list[tuple[int, Asked]]] = {kind: [] for kind in OPEN}
    for index, picture in enumerate(pictured):
        for asked in open_questions(picture.name, picture.measured):
            by_kind[asked.kind].append((index, asked))
    by_kind[PEOPLE] = _even(by_kind[PEOPLE], generator)
    share = most // (len(OPEN) - 1)
    # Flags are few; the other kinds share what is left evenly.
    return [
        one
        for kind, found in by_kind.items()
        for one in generator.sample(found, min(share if kind != COUNTRY else share // 4, len(found)))
    ]


def _even(found: list[tuple[int, Asked]], generator: random.Random) -> list[tuple[int, Asked]]:
    """As many of each answer as there are of the second most frequent one: else "one" would always be a good guess."""
    by_answer: dict[str, list[tuple[int, Asked]]] = defaultdict(list)
    for one in found:
        by_answer[one[1].answer].append(one)
    counts = sorted(map(len, by_answer.values()))
    most = counts[-2] if len(counts) > 1 else counts[-1]
    return [one for group in by_answer.values() for one in generator.sample(group, min(most, len(group)))]

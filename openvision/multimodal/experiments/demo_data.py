"""Conversations about the images of shards, in LLaVA's format, and questions for their held-out splits.

    folder/images/SPLIT/KEY.png        the images
    folder/captions.json               a caption of every training image
    folder/train.json                  conversations about the training images
    folder/SPLIT/questions.json        single questions about the images of validation and the held-out splits

In each split every yes-or-no question has as many images with the answer yes as with no, and nearly so in training. A
model without images gives a question one answer, so it is right exactly half of the time.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from openvision.data.shards.dataset import ShardDataset
from openvision.data.sources.openmoji.attributes import VisualAttributes, measure
from openvision.data.sources.openmoji.names import EmojiName
from openvision.data.sources.openmoji.split import COMPOSITIONAL, RANDOM, TRAIN, VALIDATION
from openvision.errors import OpenVisionError
from openvision.files import atomic_folder, make_folder
from openvision.images.decode import decode_image
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
from openvision.untrusted import safe_name

CAPTIONS, CONVERSATIONS, QUESTIONS = "captions.json", "train.json", "questions.json"
SPLITS = (VALIDATION, COMPOSITIONAL, RANDOM)
_STAMP = "demo.json"
# How often a topic has a "yes" question rather than a "no" question and the open one; balances yes and no.
_YES_SHARE = 0.42
_VERSION = 3


@dataclass(frozen=True)
class DemoOptions:
    """Amount of data."""

    turns: int = 8
    """Questions in a conversation."""
    rounds: int = 2
    """Conversations about each training image."""
    pairs: int = 600
    """Maximum number of images with either answer for one question text, in a round."""
    yes_no: int = 300
    """Maximum number of yes-or-no questions in a held-out split."""
    open_: int = 300
    """Maximum number of open questions in a held-out split."""
    seed: int = 0


LlavaTurn = TypedDict("LlavaTurn", {"from": str, "value": str})


class LlavaRow(TypedDict):
    """A conversation in LLaVA's format."""

    id: str
    image: str
    conversations: list[LlavaTurn]


@dataclass(frozen=True)
class DrawnImage:
    """An image, its name and the measurements of its pixels."""

    key: str
    file: str
    name: EmojiName
    measured: VisualAttributes


def make_demo_data(shards: Path, folder: Path, options: DemoOptions | None = None) -> Path:
    """Write conversations and questions about the splits of `shards` into `folder`, unless they exist.

    Raises OpenVisionError when a split is missing or `folder` holds other files.
    """
    options = options or DemoOptions()
    stamp = {"version": _VERSION, "shards": str(shards.resolve()), **vars(options)}
    if (folder / _STAMP).is_file() and json.loads((folder / _STAMP).read_text()) == stamp:
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / _STAMP).is_file():
        raise OpenVisionError(f"{folder} holds other files; choose another folder for the demonstration's data")
    with atomic_folder(folder) as temporary:
        for split in (TRAIN, *SPLITS):
            images = list(_unpack(shards / split, temporary / "images" / split))
            generator = random.Random(f"{options.seed} {split}")
            if split == TRAIN:
                (temporary / CAPTIONS).write_text(json.dumps(captions(images), indent=1), encoding="utf-8")
                rows = conversations(images, options, generator)
                (temporary / CONVERSATIONS).write_text(json.dumps(rows, indent=1), encoding="utf-8")
            else:
                asked = questions(images, options, generator)
                (make_folder(temporary / split) / QUESTIONS).write_text(json.dumps(asked, indent=1), encoding="utf-8")
        (temporary / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    return folder


def _unpack(shards: Path, images: Path) -> Iterable[DrawnImage]:
    if not shards.is_dir():
        raise OpenVisionError(f"{shards} is missing; make the images with `openvision data openmoji`")
    for sample in ShardDataset(shards):
        # The folder is renamed when complete, so its files need not be written atomically.
        file = make_folder(images) / f"{safe_name(sample.key)}.{sample.extension}"
        file.write_bytes(sample.image)
        measured = measure(decode_image(sample.image))
        # Shards of other sources have no emoji.
        emoji = str(sample.meta.get("emoji") or " ")
        yield DrawnImage(sample.key, f"{images.name}/{file.name}", EmojiName(str(sample.meta["name"]), emoji), measured)


def captions(images: Sequence[DrawnImage]) -> list[LlavaRow]:
    """A request for a caption and the caption, in LLaVA's format, one row for each image."""
    asked = [Asked("caption", "Describe it.", describe(image.name, image.measured)) for image in images]
    return [
        {"id": image.key, "image": image.file, "conversations": _turns(one, 0)}
        for image, one in zip(images, asked, strict=True)
    ]


def conversations(images: Sequence[DrawnImage], options: DemoOptions, generator: random.Random) -> list[LlavaRow]:
    """Conversations in LLaVA's format, `rounds` for each image, with up to `turns` questions each."""
    rows: list[LlavaRow] = []
    for number in range(options.rounds):
        polar = _paired(images, generator, most=options.pairs)
        for index, image in enumerate(images):
            chosen = _choose(open_questions(image.name, image.measured), polar[index], options.turns, generator)
            rows.append(
                {
                    "id": f"{image.key}-{number}",
                    "image": image.file,
                    "conversations": [turn for place, one in enumerate(chosen) for turn in _turns(one, place)],
                }
            )
    return rows


def _choose(open_: list[Asked], polar: list[Asked], turns: int, generator: random.Random) -> list[Asked]:
    """Up to `turns` questions in random order, none of which gives away the answer to a later one.

    On a topic, it asks either a question with the answer yes, which gives the topic away, or one with the answer no and
    then the open one.
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
    """Skip half of the questions for the number of people when there are none, because most images show none."""
    return asked.kind == PEOPLE and asked.answer == "zero" and generator.random() < 0.5


def _turns(asked: Asked, place: int) -> list[LlavaTurn]:
    mark = "" if place else f"{IMAGE_TOKEN}\n"
    return [{"from": "human", "value": mark + asked.question}, {"from": "gpt", "value": asked.answer}]


def _paired(images: Sequence[DrawnImage], generator: random.Random, most: int | None = None) -> list[list[Asked]]:
    """Yes-or-no questions for every image; each text has as many images with the answer yes as with no.

    At most `most` images with either answer get a text.
    """
    holders: dict[str, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        for question in present(image.name):
            holders[question].append(index)
    asked: list[list[Asked]] = [[] for _ in images]
    for question in sorted(holders):
        have = set(holders[question])
        lack = [i for i, one in enumerate(images) if i not in have and may_ask(question, one.name)]
        count = min(len(have), len(lack), most or len(have))
        for answer, indices in (("yes", sorted(have)), ("no", lack)):
            for index in generator.sample(indices, count):
                asked[index].append(Asked(YES_NO, question, answer))
    return asked


def questions(images: Sequence[DrawnImage], options: DemoOptions, generator: random.Random) -> list[dict[str, str]]:
    """Single questions: balanced yes-or-no ones, and open ones balanced over kinds and, for counts, answers."""
    chosen = [*_balanced(images, options.yes_no, generator), *_spread(images, options.open_, generator)]
    return [
        {
            "id": f"{number:04d}",
            "image": f"../images/{images[index].file}",
            "kind": asked.kind,
            "question": asked.question,
            "answer": asked.answer,
        }
        for number, (index, asked) in enumerate(chosen)
    ]


def _balanced(images: Sequence[DrawnImage], most: int, generator: random.Random) -> list[tuple[int, Asked]]:
    """Pairs of one yes and one no to the same text, sampled with fixed shares of the topics."""
    by_text: dict[str, dict[str, list[tuple[int, Asked]]]] = defaultdict(lambda: {"yes": [], "no": []})
    for index, asked in enumerate(_paired(images, generator)):
        for one in asked:
            by_text[one.question][one.answer].append((index, one))
    pairs: dict[str | None, list[list[tuple[int, Asked]]]] = {None: [], SKIN: [], NAME: []}
    for question in sorted(by_text):
        for yes, no in zip(by_text[question]["yes"], by_text[question]["no"], strict=True):
            pairs[yes[1].topic].append([yes, no])
    # Half ask for a kind or a gender, a quarter for the skin, a quarter for the name.
    shares = {None: most // 4, SKIN: most // 8, NAME: most // 8}
    picked = [generator.sample(pairs[topic], min(share, len(pairs[topic]))) for topic, share in shares.items()]
    return [one for group in picked for pair in group for one in pair]


def _spread(images: Sequence[DrawnImage], most: int, generator: random.Random) -> list[tuple[int, Asked]]:
    by_kind: dict[str, list[tuple[int, Asked]]] = {kind: [] for kind in OPEN}
    for index, image in enumerate(images):
        for asked in open_questions(image.name, image.measured):
            by_kind[asked.kind].append((index, asked))
    by_kind[PEOPLE] = _even(by_kind[PEOPLE], generator)
    share = most // (len(OPEN) - 1)
    # There are few flags; the other kinds share the rest evenly.
    return [
        one
        for kind, found in by_kind.items()
        for one in generator.sample(found, min(share if kind != COUNTRY else share // 4, len(found)))
    ]


def _even(found: list[tuple[int, Asked]], generator: random.Random) -> list[tuple[int, Asked]]:
    """At most as many of an answer as of the second most frequent one: else "one" would always be a good guess."""
    by_answer: dict[str, list[tuple[int, Asked]]] = defaultdict(list)
    for one in found:
        by_answer[one[1].answer].append(one)
    counts = sorted(map(len, by_answer.values()))
    most = counts[-2] if len(counts) > 1 else counts[-1]
    return [one for group in by_answer.values() for one in generator.sample(group, min(most, len(group)))]

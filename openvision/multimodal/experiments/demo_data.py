"""Conversations about the images of shards, in LLaVA's format, and questions for their held-out splits.

    folder/images/SPLIT/KEY.png        the images
    folder/captions.json               a caption of every training image
    folder/train.json                  conversations about the training images
    folder/SPLIT/questions.json        single questions about the images of validation and the held-out splits

What can be asked depends on the shards: `experiments/emoji.py` and `experiments/scenes.py`. In each split every
yes-or-no question has as many images with the answer yes as with no, and nearly so in training. A model without images
gives a question one answer, so it is right exactly half of the time.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypedDict, TypeVar

from openvision.data.shards.dataset import Sample, ShardDataset
from openvision.errors import OpenVisionError
from openvision.files import atomic_folder, make_folder
from openvision.multimodal.model.llm import IMAGE_TOKEN
from openvision.untrusted import safe_name

CAPTIONS, CONVERSATIONS, QUESTIONS = "captions.json", "train.json", "questions.json"
TRAIN, VALIDATION = "train", "validation"
YES_NO = "yes/no"
_STAMP = "demo.json"
_VERSION = 4

T = TypeVar("T")


@dataclass(frozen=True)
class DemoOptions:
    """Amount of data."""

    images: int = 4000
    """Maximum number of training images."""
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


@dataclass(frozen=True)
class Asked:
    """A question and its answer."""

    kind: str
    question: str
    answer: str


LlavaTurn = TypedDict("LlavaTurn", {"from": str, "value": str})


class LlavaRow(TypedDict):
    """A conversation in LLaVA's format."""

    id: str
    image: str
    conversations: list[LlavaTurn]


@dataclass(frozen=True)
class Drawn(Generic[T]):
    """An image and what is known of it."""

    key: str
    file: str
    content: T


@dataclass(frozen=True)
class Source(Generic[T]):
    """What can be asked about the images of one kind of shards."""

    command: str
    """Command that writes the shards."""
    held_out: tuple[str, ...]
    """Splits that the questions are about."""
    read: Callable[[Sample], T]
    describe: Callable[[T], str]
    """A caption with all that the questions ask for."""
    converse: Callable[[Sequence[T], DemoOptions, random.Random], list[list[Asked]]]
    """The questions of one conversation about each image."""
    examine: Callable[[Sequence[T], DemoOptions, random.Random], list[tuple[int, Asked]]]
    """Single questions, each with the number of its image."""

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits with questions."""
        return (VALIDATION, *self.held_out)

    def make(self, shards: Path, folder: Path, options: DemoOptions | None = None) -> Path:
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
            for split in (TRAIN, *self.splits):
                limit = options.images if split == TRAIN else None
                images = list(islice(_unpack(self, shards / split, temporary / "images" / split), limit))
                generator = random.Random(f"{options.seed} {split}")
                if split == TRAIN:
                    _write(temporary / CAPTIONS, captions(self, images))
                    _write(temporary / CONVERSATIONS, conversations(self, images, options, generator))
                else:
                    _write(make_folder(temporary / split) / QUESTIONS, questions(self, images, options, generator))
            (temporary / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        return folder


def _write(file: Path, rows: Sequence[object]) -> None:
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _unpack(source: Source[T], shards: Path, images: Path) -> Iterable[Drawn[T]]:
    if not shards.is_dir():
        raise OpenVisionError(f"{shards} is missing; make the images with `{source.command}`")
    for sample in ShardDataset(shards):
        # The folder is renamed when complete, so its files need not be written atomically.
        file = make_folder(images) / f"{safe_name(sample.key)}.{sample.extension}"
        file.write_bytes(sample.image)
        yield Drawn(sample.key, f"{images.name}/{file.name}", source.read(sample))


def captions(source: Source[T], images: Sequence[Drawn[T]]) -> list[LlavaRow]:
    """A request for a caption and the caption, in LLaVA's format, one row for each image."""
    asked = [Asked("caption", "Describe it.", source.describe(image.content)) for image in images]
    return [
        {"id": image.key, "image": image.file, "conversations": _turns(one, 0)}
        for image, one in zip(images, asked, strict=True)
    ]


def conversations(
    source: Source[T], images: Sequence[Drawn[T]], options: DemoOptions, generator: random.Random
) -> list[LlavaRow]:
    """Conversations in LLaVA's format, `rounds` for each image, with up to `turns` questions each."""
    rows: list[LlavaRow] = []
    for number in range(options.rounds):
        chosen = source.converse([image.content for image in images], options, generator)
        for image, asked in zip(images, chosen, strict=True):
            turns = [turn for place, one in enumerate(asked) for turn in _turns(one, place)]
            rows.append({"id": f"{image.key}-{number}", "image": image.file, "conversations": turns})
    return rows


def _turns(asked: Asked, place: int) -> list[LlavaTurn]:
    mark = "" if place else f"{IMAGE_TOKEN}\n"
    return [{"from": "human", "value": mark + asked.question}, {"from": "gpt", "value": asked.answer}]


def questions(
    source: Source[T], images: Sequence[Drawn[T]], options: DemoOptions, generator: random.Random
) -> list[dict[str, str]]:
    """Single questions about the images of a split."""
    chosen = source.examine([image.content for image in images], options, generator)
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


def paired(
    present: Sequence[frozenset[str]],
    may_ask: Callable[[str, int], bool],
    generator: random.Random,
    most: int | None = None,
) -> list[list[Asked]]:
    """Yes-or-no questions for every image; each text has as many images with the answer yes as with no.

    `present` has the questions whose answer is yes, image by image; `may_ask` says whether "no" is a true and clear
    answer to a question about an image. At most `most` images with either answer get a text.
    """
    holders: dict[str, list[int]] = defaultdict(list)
    for index, texts in enumerate(present):
        for question in texts:
            holders[question].append(index)
    asked: list[list[Asked]] = [[] for _ in present]
    for question in sorted(holders):
        have = set(holders[question])
        lack = [index for index in range(len(present)) if index not in have and may_ask(question, index)]
        count = min(len(have), len(lack), most or len(have))
        for answer, indices in (("yes", sorted(have)), ("no", lack)):
            for index in generator.sample(indices, count):
                asked[index].append(Asked(YES_NO, question, answer))
    return asked


def pairs_of(asked: Sequence[Sequence[Asked]]) -> Iterable[tuple[tuple[int, Asked], tuple[int, Asked]]]:
    """What `paired` found as pairs of one yes and one no to the same text, in the order of the texts."""
    by_text: dict[str, dict[str, list[tuple[int, Asked]]]] = defaultdict(lambda: {"yes": [], "no": []})
    for index, found in enumerate(asked):
        for one in found:
            by_text[one.question][one.answer].append((index, one))
    for question in sorted(by_text):
        yield from zip(by_text[question]["yes"], by_text[question]["no"], strict=True)


def even(found: list[tuple[int, Asked]], generator: random.Random) -> list[tuple[int, Asked]]:
    """At most as many of an answer as of the second most frequent one: else "one" would always be a good guess."""
    by_answer: dict[str, list[tuple[int, Asked]]] = defaultdict(list)
    for one in found:
        by_answer[one[1].answer].append(one)
    counts = sorted(map(len, by_answer.values()))
    most = counts[-2] if len(counts) > 1 else counts[-1]
    return [one for group in by_answer.values() for one in generator.sample(group, min(most, len(group)))]

"""Conversations about drawn images: true, balanced, in LLaVA's format, and nothing held out among them."""

import io
import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from openvision.data.shards.dataset import ShardWriter
from openvision.data.sources.openmoji.attributes import VisualAttributes
from openvision.data.sources.openmoji.names import EmojiName, clean_name
from openvision.errors import OpenVisionError
from openvision.multimodal.benchmarks.benchmark import tabulate
from openvision.multimodal.benchmarks.scorers.pictures import PICTURES
from openvision.multimodal.data.dataset import read_llava_json
from openvision.multimodal.experiments.demo_data import (
    DemoOptions,
    Drawn,
    LlavaRow,
    conversations,
    questions,
)
from openvision.multimodal.experiments.emoji import (
    COLOUR,
    COUNTRY,
    EMOJI,
    NAME,
    PEOPLE,
    SKIN,
    Emoji,
    count_people,
    describe,
    may_ask,
    open_questions,
    present,
)

RED = VisualAttributes(("red", "white"), 0.7, 0.6, True, 0.8, 0.8, 0.95, False)
DRAWN = {
    "\U0001f469\U0001f3ff‍\U0001f52c": "woman scientist dark skin tone",
    "\U0001f468\U0001f3fb‍\U0001f52c": "man scientist light skin tone",
    "\U0001f1eb\U0001f1f7": "France",
    "\U0001f431": "cat face",
    "\U0001f34e": "red apple",
    "\U0001f46b": "woman and man holding hands",
    "\U0001f91d\U0001f3fd": "handshake medium skin tone",
    "\U0001f697": "automobile",
    "\U0001f468‍\U0001f469‍\U0001f466": "family man woman boy",
    "\U0001f600": "grinning face",
    "\U0001f415": "dog",
    "\U0001f9d1\U0001f3fd": "person medium skin tone",
}


def names() -> list[EmojiName]:
    return [clean_name(emoji, english) for emoji, english in DRAWN.items()]


def named(text: str) -> EmojiName:
    return next(name for name in names() if name.text == text)


def answers(name: EmojiName) -> dict[str, str]:
    return {asked.kind: asked.answer for asked in open_questions(name, RED)}


def test_open_answers_are_what_the_name_says():
    expected = {NAME: "woman scientist", COLOUR: "red", SKIN: "dark", PEOPLE: "one"}
    assert answers(named("woman scientist dark skin tone")) == expected
    assert answers(named("flag france")) == {NAME: "flag france", COUNTRY: "france", COLOUR: "red", PEOPLE: "zero"}
    assert answers(named("red apple")) == {NAME: "red apple", COLOUR: "red", PEOPLE: "zero"}


def test_captions_hold_every_open_answer():
    assert describe(named("woman scientist dark skin tone"), RED) == "woman scientist, one person, dark skin, red"
    assert describe(named("flag france"), RED) == "flag france, france, a flag, red"
    assert describe(named("grinning face"), RED) == "grinning face, a face, red"
    for name in names():
        told = describe(name, RED)
        for question, answer in answers(name).items():
            assert answer in told or (question == PEOPLE and answer == "zero"), (told, answer)


@pytest.mark.parametrize(
    ("text", "people"),
    [
        ("woman and man holding hands", 2),
        ("family man woman boy", 3),
        ("automobile", 0),
        ("man scientist light skin tone", 1),
        # Faces and hands: whether people are seen is open.
        ("grinning face", None),
        ("handshake medium skin tone", None),
    ],
)
def test_people_are_counted_where_the_name_tells(text, people):
    assert count_people(named(text)) == people


def test_yes_and_no_are_true():
    woman, man, person = (
        named("woman scientist dark skin tone"),
        named("man scientist light skin tone"),
        named("person medium skin tone"),
    )
    assert {"Is there a woman?", "Is there a person?", "Is the skin dark?", "Is it woman scientist?"} == present(woman)
    assert "Is there a woman?" not in present(man)
    assert may_ask("Is there a woman?", man)
    # A person drawn without gender is neither a clear yes nor a clear no.
    assert not may_ask("Is there a woman?", person)
    assert not may_ask("Is the skin dark?", named("automobile"))
    assert {"Is there a woman?", "Is there a man?"} <= present(named("woman and man holding hands"))


def images() -> list[Drawn[Emoji]]:
    return [Drawn(str(i), f"train/{i}.png", Emoji(name, RED)) for i, name in enumerate(names())]


def polar(rows: list[dict]) -> dict[str, Counter]:
    found: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        found[row["question"]][row["answer"]] += 1
    return {question: count for question, count in found.items() if set(count) <= {"yes", "no"}}


def test_every_text_has_as_many_yes_as_no():
    rows = questions(EMOJI, images(), DemoOptions(yes_no=1000), random.Random(0))
    found = polar([row for row in rows if row["kind"] == "yes/no"])
    assert len(found) > 8
    assert all(count["yes"] == count["no"] for count in found.values())


def test_a_model_without_images_is_right_half_the_time(tmp_path):
    rows = questions(EMOJI, images(), DemoOptions(yes_no=1000), random.Random(0))
    (tmp_path / "train").mkdir()
    for row in rows:
        row["image"] = "a.png"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    asked = PICTURES.read(tmp_path)
    # One text, one answer, whatever it is.
    said = {question.id: ("yes", "no")[len(question.prompt) % 2] for question in asked}
    marks = tabulate(PICTURES, asked, said)
    assert PICTURES.metrics(marks, np.ones(len(marks)))["yes_no"] == 50


def turns_of(row: LlavaRow) -> list[tuple[str, str]]:
    said = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


def topic_of(question: str) -> str | None:
    if question.startswith("Is it ") or question in ("What is this?", "Which country is it?"):
        return "name"
    return "skin" if "skin" in question else None


def test_no_answer_of_a_conversation_gives_away_a_later_one():
    rows = conversations(EMOJI, images(), DemoOptions(turns=8, rounds=5), random.Random(0))
    assert len(rows) == 5 * len(DRAWN)
    for row in rows:
        asked = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
        assert len(asked) <= 8
        assert asked[0].startswith("<image>\n")
        assert sum("<image>" in text for text in asked) == 1
        known = set()
        for question, answer in turns_of(row):
            topic = topic_of(question)
            assert topic is None or topic not in known, row
            # A "no" leaves the topic open; a "yes" and an open answer close it.
            known |= {topic} if answer != "no" else set()


def test_conversations_say_yes_about_as_often_as_no():
    rows = conversations(EMOJI, images(), DemoOptions(turns=8, rounds=200), random.Random(0))
    named = Counter(answer for row in rows for question, answer in turns_of(row) if question.startswith("Is it "))
    assert 0.8 < named["yes"] / named["no"] < 1.25


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The twelve names as red images, in every split."""
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "validation", "heldout_compositional", "heldout_random"):
        with ShardWriter(folder / split) as writer:
            for number, name in enumerate(names()):
                buffer = io.BytesIO()
                pixels = np.full((32, 32, 3), 255, np.uint8)
                pixels[8:24, 8:24] = (234, 90, 71)
                Image.fromarray(pixels).save(buffer, "PNG")
                meta = {"name": name.text, "emoji": name.emoji, "category": name.kind, "synthetic": "x."}
                writer.write(f"{split}-{number}", buffer.getvalue(), "png", name.text, meta)
    return folder


def test_files_are_llavas_and_each_split_has_its_own_images(shards, tmp_path):
    folder = EMOJI.make(shards, tmp_path / "data")
    collection = read_llava_json([folder / "train.json"], folder / "images")
    assert len(collection.samples) == DemoOptions().rounds * len(DRAWN)
    captions = read_llava_json([folder / "captions.json"], folder / "images").samples
    assert [sample.conversation.id for sample in captions] == [f"train-{number}" for number in range(len(DRAWN))]
    assert not collection.dropped
    rows = json.loads((folder / "train.json").read_text())
    assert all(row["image"].startswith("train/") for row in rows)
    for split in ("validation", "heldout_compositional", "heldout_random"):
        asked = PICTURES.read(folder / split)
        assert {question.image.parent.name for question in asked} == {split}
    assert answers_of(folder / "validation")[COLOUR] == {"red"}


def answers_of(folder) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for row in json.loads((folder / "questions.json").read_text()):
        found[row["kind"]].add(row["answer"])
    return found


def test_data_are_made_once_and_alike(shards, tmp_path):
    first = EMOJI.make(shards, tmp_path / "a")
    stamp = (first / "train.json").stat().st_mtime_ns
    assert EMOJI.make(shards, tmp_path / "a") == first
    assert (first / "train.json").stat().st_mtime_ns == stamp
    second = EMOJI.make(shards, tmp_path / "b")
    for name in ("captions.json", "train.json", "validation/questions.json", "heldout_random/questions.json"):
        assert (first / name).read_text() == (second / name).read_text()


def test_a_foreign_folder_is_not_overwritten(shards, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OpenVisionError, match="holds other files"):
        EMOJI.make(shards, tmp_path)


def test_missing_split_says_what_to_run(tmp_path):
    with pytest.raises(OpenVisionError, match="openvision data openmoji"):
        EMOJI.make(tmp_path / "none", tmp_path / "out")

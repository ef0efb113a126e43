"""Questions about composed scenes: true, balanced, and none that gives away another one's answer."""

import random
from collections import Counter

import pytest

from openvision.data.shards.dataset import Sample, ShardDataset
from openvision.data.sources.scenes.make import Options, make_scenes
from openvision.errors import OpenVisionError
from openvision.multimodal.benchmarks.scorers.pictures import PICTURES
from openvision.multimodal.experiments.demo import source_of
from openvision.multimodal.experiments.demo_data import DemoOptions
from openvision.multimodal.experiments.scenes import (
    COUNT,
    OPEN,
    SCENES,
    SceneFacts,
    converse,
    describe,
    examine,
    of_objects,
    of_scene,
    present,
    read_scene,
)

WOLVES = {
    "groups": [
        {"kind": "wolf", "category": "animal", "count": 2, "place": "left", "size": "large"},
        {"kind": "owl", "category": "animal", "count": 1, "place": "right", "size": "small"},
    ],
    "background": {"colour": "blue", "texture": "plain"},
    "word": {"text": "SALE", "place": "above"},
}


def sample_of(meta: dict) -> Sample:
    return Sample("a", b"", "png", "", None, meta)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "data"
    make_scenes(folder, Options(train=60, held_out=60, objects=12), workers=1)
    return folder


@pytest.fixture(scope="module")
def scenes(shards) -> list[SceneFacts]:
    return [read_scene(sample) for sample in ShardDataset(shards / "validation")]


def test_answers_are_what_the_description_says():
    scene = read_scene(sample_of({"scene": WOLVES}))
    asked = {one.question: one.answer for group in scene.groups for one in of_objects(group, False).values()}
    assert asked | {one.question: one.answer for one in of_scene(scene)} == {
        "What is on the left?": "wolf",
        "How many wolves?": "two",
        "Where are the wolves?": "left",
        "What is on the right?": "owl",
        "How many owls?": "one",
        "Where is the owl?": "right",
        "Which colour is the background?": "blue",
        "What does the sign say?": "sale",
    }
    assert present(scene) == {"Is there a wolf?", "Is there an owl?", "Is the background blue?", "Is there a sign?"}
    assert describe(scene) == "two wolves left, an owl right, blue background, sign sale"


def test_of_one_kind_alone_nobody_asks_where_it_is():
    scene = read_scene(sample_of({"scene": WOLVES | {"groups": WOLVES["groups"][1:], "word": None}}))
    assert [one.question for one in of_objects(scene.groups[0], True).values()] == ["What is this?", "How many owls?"]
    assert "Is there a sign?" not in present(scene)


@pytest.mark.parametrize("meta", [{}, {"scene": None}, {"scene": {"groups": [{"kind": "unicorn"}]}}])
def test_a_sample_without_a_description_is_one_sentence(meta):
    with pytest.raises(OpenVisionError, match="sample a has no description of a scene; make the images with"):
        read_scene(sample_of(meta))


def test_no_answer_of_a_conversation_gives_away_another(scenes):
    answers = Counter()
    for _ in range(20):
        for scene, asked in zip(scenes, converse(scenes, DemoOptions(), random.Random(len(answers))), strict=True):
            # One thing of the background, one of the sign, and of objects one for each kind.
            assert sum("background" in one.question for one in asked) == 1
            assert sum("sign" in one.question for one in asked) <= 1
            for group in scene.groups:
                about = [one for one in asked if {group.kind.name, group.kind.plural} & set(one.question[:-1].split())]
                named = [one for one in asked if one.answer == group.kind.name]
                assert len(about) + len(named) <= 1, asked
            answers.update(one.answer for one in asked if one.question.startswith(("Is there a ", "Is there an ")))
    assert 0.6 < answers["yes"] / answers["no"] < 1.6


def test_single_questions_are_balanced(scenes):
    asked = examine(scenes, DemoOptions(yes_no=120, open_=100), random.Random(0))
    polar = Counter((one.question, one.answer) for _, one in asked if one.kind == "yes/no")
    assert polar
    for question, _ in list(polar):
        assert polar[question, "yes"] == polar[question, "no"]
    assert {one.kind for _, one in asked} == {*OPEN, "yes/no"}
    counts = Counter(one.answer for _, one in asked if one.kind == COUNT)
    assert counts["one"] <= 2 * sum(counts.values()) / 3
    for index, one in asked:
        if one.kind == "yes/no":
            assert (one.question in present(scenes[index])) == (one.answer == "yes")


def test_the_demonstration_knows_scenes_by_their_folder(shards, tmp_path):
    source = source_of(shards)
    assert source is SCENES
    folder = source.make(shards, tmp_path / "data", DemoOptions(images=10, yes_no=24, open_=20))
    assert len(list((folder / "images" / "train").iterdir())) == 10
    questions = PICTURES.read(folder / "heldout_combinations")
    assert {question.image.parent.name for question in questions} == {"heldout_combinations"}

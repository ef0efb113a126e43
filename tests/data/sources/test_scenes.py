"""Scenes: descriptions, pixels, masks and texts agree; splits hold out what they say; bytes depend on options alone."""

import base64
import io
import json
import multiprocessing
import re
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.shards.dataset import ShardDataset
from openvision.data.sources.scenes import drawings
from openvision.data.sources.scenes.make import Options, make_scenes, row
from openvision.data.sources.scenes.objects import COLOURS, HELD_OUT_WORDS, WORDS, kinds, number
from openvision.data.sources.scenes.render import Painter, arranged
from openvision.data.sources.scenes.scene import (
    COMBINATIONS,
    NEW_DRAWINGS,
    NEW_WORDS,
    SINGLE,
    SPLITS,
    TRAIN,
    VALIDATION,
    Draw,
    World,
    held_out_combinations,
    sample_scene,
)
from openvision.data.sources.scenes.texts import AltTexts, alt_text, short_text, synthetic_caption
from openvision.errors import OpenVisionError
from openvision.text.captions import sentences

OPTIONS = Options(train=400, held_out=40, objects=40)
WORLD = OPTIONS.world()
indices = st.integers(0, 5000)


@pytest.fixture(scope="module")
def painter():
    return Painter(96)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "made", OPTIONS, workers=1)


def test_names_and_glyphs_are_unique_and_plurals_are_english():
    every = kinds()
    assert len({kind.name for kind in every}) == len({kind.emoji for kind in every}) == len(every) >= 120
    assert len({kind.category for kind in kinds(20)}) == 6
    by_name = {kind.name: kind.plural for kind in every}
    assert by_name["fish"] == "fish"
    assert by_name["wolf"] == "wolves"
    assert by_name["butterfly"] == "butterflies"
    assert by_name["monkey"] == "monkeys"
    assert by_name["fox"] == "foxes"
    assert by_name["church"] == "churches"
    owl = next(kind for kind in every if kind.name == "owl")
    assert owl.counted(1) == "an owl"
    assert owl.counted(3) == "three owls"


@given(split=st.sampled_from(SPLITS), index=indices)
def test_splits_hold_out_what_they_say(split, index):
    scene = sample_scene(WORLD, split, 0, index)
    assert any(held_out_combinations(scene)) == (split == COMBINATIONS)
    word = scene.word.text if scene.word else None
    assert word in {NEW_WORDS: HELD_OUT_WORDS, SINGLE: (None,)}.get(split, (None, *WORDS))
    if split == SINGLE:
        assert [group.count for group in scene.groups] == [1]
    assert scene == sample_scene(WORLD, split, 0, index)


def test_training_and_validation_are_different_scenes():
    assert sample_scene(WORLD, TRAIN, 0, 0) != sample_scene(WORLD, VALIDATION, 0, 0)
    assert sample_scene(WORLD, TRAIN, 0, 0) != sample_scene(WORLD, TRAIN, 1, 0)


@given(count=st.integers(1, 3), width=st.floats(0.1, 1), height=st.floats(0.1, 1))
def test_objects_of_a_group_stay_in_their_room_and_apart(count, width, height):
    side, places = arranged(count, width, height)
    assert len(places) == count
    for x, y in places:
        assert abs(x) + side / 2 <= width / 2 + 1e-9
        assert abs(y) + side / 2 <= height / 2 + 1e-9
    for i, (x, y) in enumerate(places):
        for other_x, other_y in places[:i]:
            assert max(abs(x - other_x), abs(y - other_y)) >= side - 1e-9


@given(split=st.sampled_from(SPLITS), index=indices)
def test_the_mask_is_where_the_scene_differs_from_its_background(painter, split, index):
    scene = sample_scene(WORLD, split, 0, index)
    pixels, mask = painter.paint(scene)
    empty, _ = painter.paint(replace(scene, groups=(), word=None))
    numbers = set(range(1, len(scene.groups) + 1)) | ({255} if scene.word else set())
    assert set(np.unique(mask)) == numbers | {0}
    # Black on white differs by 765: what differs by more than half of that is covered by more than half.
    covered = np.abs(pixels.astype(int) - empty).sum(axis=2) > 383
    assert not (covered & (mask == 0)).any()
    assert (pixels[mask == 0] == empty[mask == 0]).all(axis=1).mean() > 0.85
    for value, group in enumerate(scene.groups, start=1):
        rows, columns = np.nonzero(mask == value)
        assert abs((columns.min() + columns.max()) / 192 - group.x) < 0.05
        assert abs((rows.min() + rows.max()) / 192 - group.y) < 0.05


@given(index=indices)
def test_captions_without_errors_say_the_scene_in_whole_grammatical_sentences(index):
    scene = sample_scene(WORLD, TRAIN, 0, index)
    caption = synthetic_caption(scene, 0.0, WORLD.kinds, Draw("caption", index))
    said = sentences(caption)
    assert 3 <= len(said) <= 7
    text = caption.lower()
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\bone \w+s are\b", text)
    for group in scene.groups:
        assert group.kind.counted(group.count) in text
    assert scene.colour in text
    known = {word for kind in kinds() for name in (kind.name, kind.plural) for word in name.split()}
    own = {word for group in scene.groups for word in group.kind.named(group.count).split()}
    mentioned = set(re.findall(r"[a-z]+", text)) & known
    printed = {scene.word.text.lower()} if scene.word else set()
    # Colours are also words of names ("orange" is not among them), verbs of captions are not names.
    assert mentioned - own - printed <= set(COLOURS) | {"top"}
    first = scene.groups[0]
    assert not re.search(
        rf"there {'are' if first.count == 1 else 'is'} {re.escape(first.kind.counted(first.count))}", text
    )


def test_captions_are_wrong_at_the_stated_rate():
    wrong = total = 0
    for index in range(1500):
        scene = sample_scene(WORLD, TRAIN, 0, index)
        caption = synthetic_caption(scene, 0.2, WORLD.kinds, Draw("caption", index)).lower()
        total += 1
        wrong += scene.groups[0].kind.counted(scene.groups[0].count) not in caption.split(". ")[0]
    # Name or number is mistaken; the number drawn instead is the right one a third of the time, the name rarely.
    expected = 1 - (1 - 0.2 * 39 / 40) * (1 - 0.2 * 2 / 3)
    assert wrong / total == pytest.approx(expected, abs=0.04)


def test_alt_texts_have_the_shares_asked_for():
    def kinds_of_texts(mix: AltTexts) -> Counter[str]:
        found: Counter[str] = Counter()
        for index in range(1500):
            scene = sample_scene(WORLD, TRAIN, 0, index)
            text = alt_text(scene, mix, Draw("alt", index))
            named = sum(group.kind.named(group.count) in text for group in scene.groups)
            found["nothing" if not named else "one" if named < len(scene.groups) else "everything"] += 1
        return found

    everything = kinds_of_texts(AltTexts(nothing=0, word=0, one=0, everything=1, junk=0.5))
    assert everything["everything"] == 1500
    half = kinds_of_texts(AltTexts(nothing=0.5, word=0, one=0, everything=0.5, junk=0))
    assert half["nothing"] / 1500 == pytest.approx(0.5, abs=0.05)


def test_short_sentences_name_every_group():
    for index in range(200):
        scene = sample_scene(WORLD, TRAIN, 0, index)
        text = short_text(scene, Draw("short", index))
        assert all(group.kind.counted(group.count) in text for group in scene.groups)


def test_shards_hold_every_split_with_texts_description_and_mask(shards):
    assert set(OPTIONS.splits) == set(SPLITS) - {NEW_DRAWINGS}
    for split in OPTIONS.splits:
        dataset = ShardDataset(shards / split)
        assert len(dataset) == OPTIONS.count(split)
        sample = dataset[0]
        assert sample.meta["short"]
        assert sample.alt
        assert sample.synthetic
        groups = sample.meta["scene"]["groups"]
        assert groups[0]["kind"] == sample.meta["name"]
        assert sample.meta["objects"] == [group["kind"] for group in groups]
        assert sample.meta["places"] == {group["kind"]: group["place"] for group in groups}
        assert sample.meta["groups"] == number(len(groups))
        assert sample.meta["count"] == number(sum(group["count"] for group in groups))
        assert sample.meta["background"] == sample.meta["scene"]["background"]["colour"]
        word = sample.meta["scene"]["word"]
        assert sample.meta.get("word") == (word["text"].lower() if word else None)
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(sample.meta["mask_png"]))))
        assert mask.shape == (96, 96)
        assert set(np.unique(mask)) >= set(range(len(groups) + 1))
    names = {ShardDataset(shards / TRAIN)[index].meta["name"] for index in range(OPTIONS.train)}
    assert len(names) > 35
    card = (shards / "DATA.md").read_text()
    assert "CC BY-SA 4.0" in card
    assert "heldout_words | 40" in card


def test_equal_options_give_equal_bytes_whatever_the_number_of_processes(shards, tmp_path):
    again = make_scenes(tmp_path / "again", OPTIONS, workers=2)
    for path in sorted(shards.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(shards)).read_bytes(), path.name


def test_made_scenes_are_found_again_and_others_are_not_overwritten(shards, tmp_path):
    stamp = (shards / "scenes.json").stat().st_mtime_ns
    assert make_scenes(shards, OPTIONS) == shards
    assert (shards / "scenes.json").stat().st_mtime_ns == stamp
    with pytest.raises(OpenVisionError, match="other options"):
        make_scenes(shards, replace(OPTIONS, seed=1))
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(OpenVisionError, match="other files"):
        make_scenes(tmp_path, OPTIONS)


def test_another_mix_of_alt_texts_leaves_images_and_captions(painter):
    _, image, alt, meta = row(OPTIONS, WORLD, painter, TRAIN, 3)
    other = replace(OPTIONS, alt=AltTexts(nothing=1, word=0, one=0, everything=0))
    _, same_image, other_alt, same_meta = row(other, WORLD, painter, TRAIN, 3)
    assert (image, meta) == (same_image, same_meta)
    assert alt != other_alt


def test_larger_images_show_the_same_scene():
    _, small, _, meta = row(OPTIONS, WORLD, Painter(96), TRAIN, 5)
    _, large, _, same = row(OPTIONS, WORLD, Painter(192), TRAIN, 5)
    assert json.dumps(meta["scene"]) == json.dumps(same["scene"])
    sizes = [Image.open(io.BytesIO(data)) for data in (small, large)]
    difference = np.asarray(sizes[0].convert("RGB"), dtype=int) - np.asarray(
        sizes[1].convert("RGB").reduce(2), dtype=int
    )
    assert np.abs(difference).mean() < 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "64"], "size of 64 px is too small"),
        (["--alt-nothing", "0.9"], "must sum to 1, not 1.7"),
        (["--alt-nothing", "-0.05"], "say nothing, -0.05, must be between 0 and 1"),
        (["--alt-junk", "1.5"], "with junk, 1.5, must be between 0 and 1"),
        (["--word-size", "0.05"], "word size 0.05 must be between 0.125 and 0.4"),
        (["--objects", "4000"], "objects 4000 must be between"),
        (["--objects", "2"], "objects 2 must be between"),
        (["--words", "1.5"], "word share 1.5"),
        (["--caption-errors", "2"], "caption errors 2"),
        (["--train", "5"], "5 training scenes never show"),
        (["--train", "1", "--objects", "3"], "one training scene never shows"),
        (["--aspect", "1", "--aspect", "20"], "the aspects (1, 20) must be between 0.125 and 8"),
        (["--aspect", "nan"], "the aspects (nan) must be"),
        (["--drawings", "--offline", "--packages", "nowhere"], "is not in nowhere; run once without --offline"),
    ],
)
def test_bad_options_are_one_sentence_and_leave_nothing(tmp_path, options, message):
    result = CliRunner().invoke(app, ["data", "scenes", str(tmp_path / "out"), *options])
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_world_in_which_an_object_could_not_be_trained_is_refused():
    with pytest.raises(OpenVisionError, match="too few"):
        World(kinds(2))


def test_a_file_or_a_damaged_stamp_in_the_place_of_the_folder_is_one_sentence(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(OpenVisionError, match="is a file"):
        make_scenes(tmp_path / "notes.txt", OPTIONS)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "scenes.json").write_text("{")
    with pytest.raises(OpenVisionError, match="is damaged"):
        make_scenes(tmp_path / "made", OPTIONS)


def test_an_interrupt_ends_the_workers_and_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    bystander.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            make_scenes(tmp_path / "made", OPTIONS, workers=2, progress=interrupt)
        workers = [child for child in multiprocessing.active_children() if child is not bystander]
        # Asked again: while the thread of the pool takes note of an end, a worker may seem alive for a moment.
        deadline = time.monotonic() + 60
        while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [worker for worker in workers if worker.is_alive()]
        assert bystander.is_alive(), "another child of this process is none of its business"
    finally:
        bystander.kill()
        bystander.join()
    assert not list(tmp_path.iterdir())


def test_without_printed_words_there_are_no_new_ones_and_the_card_says_so(tmp_path):
    folder = make_scenes(tmp_path / "made", replace(OPTIONS, train=200, held_out=5, word_share=0), workers=1)
    assert not (folder / NEW_WORDS).exists()
    card = (folder / "DATA.md").read_text()
    assert NEW_WORDS not in card
    assert "0% the printed word, 55% one group" in card


def test_printed_words_have_the_size_asked_for_and_stay_in_their_band(painter):
    for size in (0.2, 0.27):
        world = replace(WORLD, word_share=1, word_size=size)
        heights, lefts = [], set()
        for index in range(60):
            scene = sample_scene(world, TRAIN, 0, index)
            word = scene.word
            assert word is not None
            rows, columns = np.nonzero(painter.paint(scene)[1] == 255)
            heights.append(rows.max() - rows.min() + 1)
            lefts.add(columns.min())
            assert columns.min() >= 2
            assert columns.max() <= 93
            inside = rows.max() <= 96 * size + 1 if word.place == "above" else rows.min() >= 96 * (1 - size) - 1
            assert inside
        # Capitals are about three quarters of an em; long words are printed smaller.
        assert 0.6 * size * 96 < max(heights) < 0.85 * size * 96
        assert len(lefts) > 10


WIDE = replace(OPTIONS, aspects=(0.25, 0.5, 1.0, 2.0, 4.0))


def test_images_of_other_shapes_have_the_area_of_a_square(painter):
    shapes = Counter()
    for index in range(200):
        scene = sample_scene(WIDE.world(), TRAIN, 0, index)
        pixels, mask = painter.paint(scene)
        assert pixels.shape[:2] == mask.shape
        assert pixels.shape[1] / pixels.shape[0] == pytest.approx(scene.aspect, rel=0.02)
        assert mask.size == pytest.approx(96**2, rel=0.02)
        assert set(np.unique(mask)) >= set(range(len(scene.groups) + 1))
        shapes[scene.aspect] += 1
    assert set(shapes) == set(WIDE.aspects)
    assert min(shapes.values()) > 20


def test_groups_stand_in_a_row_on_a_panorama_and_in_a_column_on_a_receipt(painter):
    """With the word beside them on a panorama, above or below on a receipt, and nobody over another."""
    rows = columns = 0
    for index in range(400):
        scene = sample_scene(replace(WIDE.world(), word_share=0.7), TRAIN, 0, index)
        if 0.5 < scene.aspect < 2:
            continue
        mask = painter.paint(scene)[1]
        boxes = {value: np.nonzero(mask == value) for value in np.unique(mask) if value}
        axis = 1 if scene.aspect > 1 else 0
        in_order = sorted(range(len(scene.groups)), key=lambda at: (scene.groups[at].y, scene.groups[at].x)[axis])
        spans = [(boxes[at + 1][axis].min(), boxes[at + 1][axis].max()) for at in in_order]
        assert all(before[1] < after[0] for before, after in pairwise(spans))
        rows, columns = rows + (axis == 1), columns + (axis == 0)
        if scene.word is None:
            continue
        assert scene.word.place in (("to the left of", "to the right of") if axis else ("above", "below"))
        word = boxes[255][axis]
        inside = word.max() < spans[0][0] if scene.word.is_first else word.min() > spans[-1][1]
        assert inside
        assert f"{scene.word.place} the" in " ".join(
            synthetic_caption(scene, 0, WORLD.kinds, Draw("caption", index, each)) for each in range(20)
        )
    assert min(rows, columns) > 50


def test_squares_are_the_same_beside_other_shapes():
    wide = WIDE.world()
    same = [index for index in range(40) if sample_scene(wide, TRAIN, 0, index).aspect == 1]
    assert same
    assert all(sample_scene(wide, TRAIN, 0, index) == sample_scene(WORLD, TRAIN, 0, index) for index in same)


def test_a_folder_of_shapes_is_found_made_and_is_not_one_of_squares(tmp_path):
    options = replace(WIDE, train=200, held_out=5)
    folder = make_scenes(tmp_path / "made", options, workers=1)
    before = (folder / "scenes.json").stat().st_mtime_ns
    assert make_scenes(folder, options, workers=1) == folder
    assert (folder / "scenes.json").stat().st_mtime_ns == before
    assert "width over height one of 0.25, 0.5, 1, 2, 4" in (folder / "DATA.md").read_text()
    with pytest.raises(OpenVisionError, match="scenes of other options"):
        make_scenes(folder, replace(options, aspects=(1.0,)), workers=1)


def test_a_url_is_no_folder_for_scenes():
    result = CliRunner().invoke(app, ["data", "scenes", "s3://bucket/scenes"])
    assert "s3://bucket/scenes is a URL; write the scenes into a local folder" in str(result.exception)


def test_another_artist_draws_the_same_scene(painter):
    red = io.BytesIO()
    Image.new("RGBA", (200, 100), (255, 0, 0, 255)).save(red, "PNG")
    other = Painter(96, {kind.emoji: red.getvalue() for kind in WORLD.kinds})
    scene = sample_scene(WORLD, SINGLE, 0, 1)
    pixels, mask = other.paint(scene)
    assert (pixels[mask == 1] == (255, 0, 0)).mean() > 0.9
    rows, columns = np.nonzero(mask == 1)
    assert columns.max() - columns.min() == pytest.approx(2 * (rows.max() - rows.min()), abs=3)
    assert np.array_equal(pixels[0, 0], painter.paint(scene)[0][0, 0])


@pytest.mark.parametrize("known", [True, False])
def test_drawings_come_from_the_package_and_a_missing_one_is_one_sentence(tmp_path, monkeypatch, known):
    square = '<path fill="#0a0" d="M2 2h28v28H2z"/>'
    codes = {f"{ord(kind.emoji[0]):x}" if known else "1f600": "square" for kind in WORLD.kinds}
    content = {
        "icons.json": {"width": 32, "height": 32, "icons": {"square": {"body": square}}},
        "chars.json": codes,
    }
    monkeypatch.setattr(drawings.Packages, "read_object", lambda self, short, member: content[member])
    monkeypatch.setattr(drawings.Packages, "path", lambda self, short: tmp_path / "noto.tgz")
    if known:
        found = drawings.other_drawings(WORLD.kinds, tmp_path, offline=True)
        assert found.keys() == {kind.emoji for kind in WORLD.kinds}
        image = Image.open(io.BytesIO(found["🐈"]))
        assert image.mode == "RGBA"
        assert image.size == (224, 224)
        return
    with pytest.raises(OpenVisionError, match=r"noto.tgz has no drawing of 'umbrella'"):
        drawings.other_drawings(WORLD.kinds, tmp_path, offline=True)

"""OpenMoji: rendered glyphs, true captions, and a split that tests what it says it tests."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest

from openvision.data.shards.dataset import ShardDataset
from openvision.data.sources.openmoji.attributes import measure
from openvision.data.sources.openmoji.captions import alt_text, synthetic_caption
from openvision.data.sources.openmoji.glyphs import Glyph, all_names, font_path, render_all
from openvision.data.sources.openmoji.make import DEFAULT_SIZE, make_openmoji
from openvision.data.sources.openmoji.names import clean_name
from openvision.data.sources.openmoji.split import COMPOSITIONAL, RANDOM, VALIDATION, committed_split, make_split
from openvision.errors import OpenVisionError
from openvision.files import atomic_write_bytes
from openvision.images.decode import decode_image
from openvision.text.captions import sentences


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory, worker_id) -> list[Glyph]:
    """Rendered once for all processes of the tests, which share a folder."""
    folder = tmp_path_factory.getbasetemp()
    kept = (folder if worker_id == "master" else folder.parent) / "glyphs.pickle"
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    rendered = list(render_all(DEFAULT_SIZE, font_path()))
    atomic_write_bytes(kept, pickle.dumps(rendered))
    return rendered


@pytest.fixture(scope="module")
def captions(glyphs):
    """Of every eighth glyph: to measure all takes longer than to render them."""
    return {glyph.name.text: caption_of(glyph) for glyph in glyphs[::8]}


def caption_of(glyph: Glyph) -> str:
    return synthetic_caption(glyph.name, measure(glyph.pixels))


@pytest.fixture(scope="module")
def by_name(glyphs):
    return {glyph.name.text: glyph for glyph in glyphs}


@pytest.fixture(scope="module")
def split():
    return committed_split()


def test_no_image_is_empty_and_none_stands_twice(glyphs):
    assert len(glyphs) > 3700
    assert all((glyph.pixels < 200).any() for glyph in glyphs)
    assert len({glyph.pixels.tobytes() for glyph in glyphs}) == len(glyphs)
    assert len({glyph.name.text for glyph in glyphs}) == len(glyphs)
    assert len({glyph.key for glyph in glyphs}) == len(glyphs)


def test_no_glyph_is_cut_off(glyphs):
    # Only what is drawn up to the edge of the glyph itself, like the sea under a ferry, may come near the border.
    for glyph in glyphs:
        pixels = glyph.pixels
        rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (rim.min(axis=1) > 200).all(), glyph.name.text


def test_of_equal_images_the_best_known_name_stays(by_name):
    for name in ("flag france", "flag spain", "flag norway", "flag australia"):
        assert name in by_name
    assert "flag clipperton island" not in by_name


def test_names_the_font_has_no_glyph_for_are_left_out(by_name):
    # Two glyphs in a row, and one yellow image for all skin tones.
    assert "leftwards thumb sign light skin tone" not in by_name
    assert "people wrestling light skin tone dark skin tone" not in by_name
    assert "people wrestling" in by_name or "men wrestling" in by_name


def test_the_committed_split_is_the_one_the_function_makes(glyphs, split):
    # Made at the default size: at another size a few more images can look alike.
    made = make_split(glyph.name for glyph in glyphs)
    assert made == split


def test_sizes_of_the_split(split):
    counts = {part: list(split.values()).count(part) for part in (VALIDATION, COMPOSITIONAL, RANDOM)}
    assert all(370 <= count <= 420 for count in counts.values())


def test_parts_of_compositional_names_are_seen_apart_and_never_together(glyphs, split):
    training = [glyph.name for glyph in glyphs if glyph.name.text not in split]
    held = [glyph.name for glyph in glyphs if split.get(glyph.name.text) == COMPOSITIONAL]
    words = {word for name in training for word in name.text.split()}
    roles = {(name.role, name.faces_right, name.hair) for name in training}
    bare = {name.bare for name in training}
    for name in held:
        assert set(name.text.split()) <= words, name.text
        if name.gender:
            assert (name.role, name.faces_right, name.hair) in roles, name.text
    assert not {name.text for name in held} & {name.text for name in training}
    beyond_tone = [name for name in held if name.bare not in bare]
    assert len(beyond_tone) > len(held) / 2


@pytest.mark.parametrize(
    ("emoji", "english", "expected"),
    [
        ("👩🏿‍🔬", ":woman_scientist_dark_skin_tone:", ("woman", "scientist", ("dark",), None, "person")),
        ("🧑🏼‍🦰", ":person_medium-light_skin_tone_red_hair:", ("person", "", ("medium-light",), "red hair", "person")),
        ("🇰🇪", ":Kenya:", (None, "flag kenya", (), None, "flag")),
        ("🕐", ":one_o’clock:", (None, "one o'clock", (), None, "clock")),
        ("🐸", ":frog:", (None, "frog", (), None, "animal")),
        ("👢", ":woman’s_boot:", (None, "woman's boot", (), None, "thing")),
        ("🧑‍🔬", ":scientist:", (None, "scientist", (), None, "person")),
        ("👍🏽", ":thumbs_up_medium_skin_tone:", (None, "thumbs up", ("medium",), None, "body")),
    ],
)
def test_names_are_taken_apart(emoji, english, expected):
    name = clean_name(emoji, english)
    assert (name.gender, name.role, name.tones, name.hair, name.kind) == expected


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("red heart", ["red", "as wide as tall and symmetric"]),
        ("black heart", ["black"]),
        ("white heart", ["mostly white"]),
        ("baseball", ["mostly white"]),
        ("flag kenya", ["kenya", "flag", "black", "green", "red", "wider than tall"]),
        ("flag poland", ["poland", "red and white"]),
        ("flag japan", ["japan"]),
        ("frog", ["animal", "green"]),
        ("man scientist dark skin tone", ["man", "scientist", "dark"]),
        ("woman running facing right", ["woman", "running", "facing right"]),
        ("blue circle", ["blue", "symmetric"]),
    ],
)
def test_captions_state_what_is_true(by_name, name, facts):
    caption = caption_of(by_name[name]).lower()
    assert all(fact in caption for fact in facts), caption


def test_colours_are_measured_not_read_from_the_name(glyphs):
    image = np.full((32, 32, 3), 255, dtype=np.uint8)
    image[8:24, 4:28] = (92, 158, 49)
    measured = measure(image)
    assert measured.colours == ("green",)
    assert measured.leading_share == 1
    assert not measured.round
    assert (measured.width, measured.height, measured.symmetry) == (0.75, 0.5, 1.0)
    caption = synthetic_caption(clean_name("❤", ":red_heart:"), measured)
    assert "green" in caption


def test_white_inside_an_outline_is_a_colour_and_paper_is_not():
    image = np.full((32, 32, 3), 255, dtype=np.uint8)
    image[4:28, 4:28] = 0
    image[6:26, 6:26] = 255
    assert measure(image).colours[0] == "white"
    image[15:17, 26:28] = 255  # A gap in the outline lets the paper in.
    assert measure(image).colours == ("black",)


def test_every_caption_has_three_to_six_sentences(captions):
    for caption in captions.values():
        pieces = sentences(caption)
        assert 3 <= len(pieces) <= 6, caption
        assert all(2 <= len(piece.split()) <= 18 for piece in pieces), caption
        assert len(caption.split()) <= 60, caption


def test_a_sentence_tells_its_image_from_most_others(captions):
    """A sentence shared by many images would make them false negatives of each other in a batch."""
    shared = Counter(piece.strip() for caption in captions.values() for piece in sentences(caption))
    # The skin tones of one name, two people of five tones each and the yellow one, may share a sentence: 26, of which
    # a quarter is read.
    assert max(shared.values()) <= 9, shared.most_common(3)


def test_alt_texts_are_messy_and_lose_no_word(glyphs):
    forms = set()
    for glyph in glyphs:
        alt = alt_text(glyph.name)
        letters = "".join(character for character in alt.lower() if character.isalnum())
        for word in glyph.name.text.split():
            assert "".join(filter(str.isalnum, word)) in letters
        forms.add(alt.lower() == glyph.name.text)
    assert forms == {True, False}


@pytest.mark.slow
def test_shards_are_made_once_and_never_over_other_files(tmp_path, split):
    folder = make_openmoji(tmp_path / "openmoji", size=24)
    stamp = (folder / "train/000000.tar").stat().st_mtime_ns
    assert make_openmoji(folder, size=24) == folder
    assert (folder / "train/000000.tar").stat().st_mtime_ns == stamp
    sample = ShardDataset(folder / COMPOSITIONAL)[0]
    assert decode_image(sample.image).shape == (24, 24, 3)
    assert split[sample.meta["name"]] == COMPOSITIONAL
    assert isinstance(sample.synthetic, str)
    assert sample.meta["hexcode"] == sample.key.upper()
    assert "CC BY-SA 4.0" in (folder / "DATA.md").read_text()
    assert json.loads((folder / "openmoji.json").read_text())["size"] == 24
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    with pytest.raises(OpenVisionError, match="holds other files"):
        make_openmoji(other)


def test_names_are_unique():
    names = all_names()
    assert len({name.text for name in names}) == len(names) > 3900

"""The benchmark set `picto`: packages are checked, names agree across styles, the split tests what it says."""

import hashlib
import io
import json
import stat
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.data import app
from openvision.data.shards.dataset import ShardDataset
from openvision.data.sources.openmoji.names import clean_name
from openvision.data.sources.picto.concepts import Concept, Concepts, plain_hexcode, readable
from openvision.data.sources.picto.emoji import STYLES
from openvision.data.sources.picto.make import Counts, Pair, Rendered, make_picto, render_all, without_duplicates
from openvision.data.sources.picto.packages import Package, Packages, committed_packages
from openvision.data.sources.picto.render import render_icon, render_page, render_png
from openvision.data.sources.picto.split import HELDOUT_CONCEPTS, TRAIN, HeldNames, is_held_out, split_of
from openvision.errors import OpenVisionError
from openvision.images.decode import BadSampleError, decode_image
from openvision.text.captions import sentences
from tests.data.sources.picto_files import ROOT, debian, fake_files, npm


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, dict[str, Package]]:
    """A folder of fake packages and the table that pins them."""
    folder = tmp_path_factory.mktemp("packages")
    table = {}
    for short, data in fake_files().items():
        package = committed_packages()[short]
        (folder / package.file).write_bytes(data)
        table[short] = replace(package, sha512=hashlib.sha512(data).hexdigest())
    return folder, table


@pytest.fixture(scope="module")
def made(packed, tmp_path_factory) -> Path:
    folder, table = packed
    return make_picto(tmp_path_factory.mktemp("made") / "picto", 48, folder, offline=True, table=table)


def samples(folder: Path, split: str) -> dict[str, list]:
    by_style = defaultdict(list)
    for sample in ShardDataset(folder / split):
        by_style[sample.meta["style"]].append(sample)
    return by_style


def test_every_style_goes_where_its_vendor_belongs(made):
    parts = {
        part: {style.name for style in STYLES if style.split == part} for part in {style.split for style in STYLES}
    }
    # Noto's drawings come twice; only what its SVGs lack is taken from the PNGs.
    assert set(samples(made, TRAIN)) == parts["train"] - {"google"} | {"openclipart"}
    assert set(samples(made, "validation_style")) == parts["validation_style"] == {"emojione", "emojione-v1"}
    assert set(samples(made, "heldout_style")) == parts["heldout_style"] == {"twitter"}
    vendors = {part: {style.vendor for style in STYLES if style.split == part} for part in parts}
    assert not vendors["train"] & vendors["validation_style"]
    assert not vendors["heldout_style"] & (vendors["train"] | vendors["validation_style"])


def test_a_held_out_concept_is_in_no_other_split_and_drawn_by_every_vendor(made):
    held = samples(made, HELDOUT_CONCEPTS)
    assert {sample.meta["name"] for found in held.values() for sample in found} == {"owl"}
    assert set(held) == {style.name for style in STYLES} - {"google"}
    for split in ("train", "validation_style", "heldout_style"):
        for sample in ShardDataset(made / split):
            assert sample.meta["concept"] != "owl"
            assert "owl" not in str(sample.alt).lower()
            assert "owl" not in str(sample.synthetic).lower()


def test_one_emoji_has_one_name_in_every_style(made):
    # EmojiOne calls it frog-face, a name of former years; Twitter by its code point.
    everything = [*samples(made, TRAIN).items(), *samples(made, "validation_style").items()]
    for style, found in everything:
        if style not in ("openclipart", "emojione-v1"):
            assert {sample.meta["name"] for sample in found} == {"frog", "hammer", "snail"}, style
    sample = samples(made, "heldout_style")["twitter"][0]
    assert sample.meta["source"] == "emoji-datasource-twitter 16.0.0"
    assert sample.meta["licence"] == "CC BY 4.0"
    assert decode_image(sample.image).shape == (48, 48, 3)


def test_captions_are_several_sentences_of_what_is_there(made):
    sample = next(s for s in samples(made, TRAIN)["openmoji"] if s.meta["name"] == "frog")
    caption = str(sample.synthetic).lower()
    assert len(sentences(str(sample.synthetic))) >= 5
    for fact in ("green", "animals and nature", "black outlines", "pond", "as wide as tall"):
        assert fact in caption, caption
    bottle = next(s for s in samples(made, TRAIN)["openclipart"] if s.meta["name"] == "A Bottle")
    assert "glass" in str(bottle.synthetic)
    assert "red" in str(bottle.synthetic)
    assert "hash" not in str(bottle.synthetic)


def test_clip_art_without_licence_or_with_a_held_out_name_stays_out(made):
    assert {sample.meta["name"] for sample in samples(made, TRAIN)["openclipart"]} == {"A Bottle", "A Cup"}
    card = (made / "DATA.md").read_text()
    for reason in ("no public-domain dedication", "names a held-out emoji", "patterns, stars, logos", "needs fonts"):
        assert f"| openclipart | {reason}" in card


def test_photographs_are_the_test_part_with_ten_classes(made):
    found = samples(made, "fashion_mnist")["fashion_mnist"]
    assert len(found) == 20
    assert len({sample.meta["name"] for sample in found}) == 10
    assert decode_image(found[0].image).shape == (28, 28, 3)
    assert json.loads((made / "fashion_mnist/classes.json").read_text())[9] == "ankle boot"
    assert "taller than wide" in found[0].synthetic


def test_the_card_names_version_licence_and_author_of_every_package(made, packed):
    card = (made / "DATA.md").read_text()
    for package in packed[1].values():
        assert f"| {package.name} | {package.version} | {package.licence} | {package.attribution} |" in card


def test_no_image_stands_twice_and_the_same_packages_give_the_same_bytes(made, packed, tmp_path):
    digests = [
        hashlib.sha256(decode_image(sample.image).tobytes()).digest()
        for split in ("train", "validation_style", "heldout_style", HELDOUT_CONCEPTS)
        for sample in ShardDataset(made / split)
    ]
    assert len(digests) == len(set(digests)) > 20
    again = make_picto(tmp_path / "again", 48, packed[0], offline=True, table=packed[1])
    assert (again / "train/000000.tar").read_bytes() == (made / "train/000000.tar").read_bytes()


def test_a_larger_set_holds_the_same_pairs(made, packed, tmp_path):
    large = make_picto(tmp_path / "large", 128, packed[0], offline=True, table=packed[1])
    for split in ("train", HELDOUT_CONCEPTS):
        assert [sample.key for sample in ShardDataset(large / split)] == [s.key for s in ShardDataset(made / split)]
    assert decode_image(ShardDataset(large / "train")[0].image).shape == (128, 128, 3)


def test_what_is_left_out_and_said_is_decided_at_one_size():
    def render(size: int) -> np.ndarray:
        pixels = np.full((size, size, 3), 255, np.uint8)
        pixels[: size // 2] = (0, 160, 0) if size > 96 else (200, 0, 0)
        return pixels

    pair = Pair("k", TRAIN, "noto", "frog", (), render, lambda measured: ("alt", measured.colours[0]), {})
    spool = io.BytesIO()
    large, small = (render_all(iter([pair]), size, spool, Counts(), lambda line: None)[0] for size in (128, 96))
    assert (large.digest, large.synthetic) == (small.digest, small.synthetic) == (large.digest, "red")
    assert decode_image(spool.getvalue()[: large.length]).shape == (128, 128, 3)


def test_a_set_is_made_once_and_never_over_other_files(made, packed, tmp_path):
    stamp = (made / "train/000000.tar").stat().st_mtime_ns
    assert make_picto(made, 48, packed[0], offline=True, table=packed[1]) == made
    assert (made / "train/000000.tar").stat().st_mtime_ns == stamp
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OpenVisionError, match="holds other files"):
        make_picto(tmp_path, 48, packed[0], offline=True, table=packed[1])


def rendered(key: str, name: str, split: str, digest: bytes) -> Rendered:
    parsed = clean_name("🖐", name)
    pair = Pair(key, split, "noto", name, parsed.tones, lambda size: np.zeros(0), lambda measured: ("", ""), {})
    return Rendered(pair, digest, 0, 0, "", "")


def test_of_identical_images_on_two_sides_one_stays():
    counts = Counts()
    kept = without_duplicates(
        [rendered("b", "flag bouvet island", HELDOUT_CONCEPTS, b"1"), rendered("n", "flag norway", TRAIN, b"1")], counts
    )
    assert [one.pair.name for one in kept] == ["flag norway"]
    assert counts.left_out["noto"]["identical to another"] == 1


def test_one_image_for_all_skin_tones_keeps_no_toned_name():
    tones = [rendered(tone, f"hand {tone} skin tone", TRAIN, b"1") for tone in ("light", "dark")]
    assert without_duplicates(tones, Counts()) == []
    kept = without_duplicates([*tones, rendered("plain", "hand", TRAIN, b"1")], Counts())
    assert [one.pair.name for one in kept] == ["hand"]


def concept(name: str, emoji: str = "🐸") -> Concept:
    return Concept(plain_hexcode(f"{ord(emoji[0]):X}"), clean_name(emoji, name), "objects", (), ())


def test_a_whole_family_is_on_one_side():
    names = ("man scientist", "woman scientist dark skin tone", "scientist", "woman scientist")
    assert {concept(name, "👩").family for name in names} == {"scientist"}
    assert {split_of(concept(name, "👩"), TRAIN) for name in names} == {HELDOUT_CONCEPTS}


def test_about_a_tenth_of_families_is_held_out_and_sides_never_change():
    held = sum(is_held_out(f"family {number}") for number in range(10_000))
    assert 900 < held < 1100
    assert [name for name in ("owl", "dog", "cat", "frog", "tiger") if is_held_out(name)] == ["owl", "dog", "cat"]


def test_held_names_are_found_in_any_order_and_number():
    held = HeldNames([concept("owl"), concept("fire engine"), concept("frog")])
    assert held.named_in("two_Owls.png")
    assert not held.named_in("howling frogs")
    assert held.named_in("engine of fire") == is_held_out("fire engine")


def test_a_name_of_two_emoji_names_none():
    one, two = concept("frog", "🐸"), concept("snail", "🐌")
    both = Concepts([one, two], [("slow one", two.hexcode), ("animal", one.hexcode), ("animal", two.hexcode)])
    assert both.by_names(["slow-one"]) == two
    assert both.by_names(["animal"]) is None
    assert both.by_names(["animal", "frog"]) == one
    assert both.by_code("1F438-FE0F") == one


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("woman scientist: dark skin tone", "woman scientist dark skin tone"),
        ("flag: Bosnia & Herzegovina", "flag Bosnia and Herzegovina"),
        ("keycap: #", "keycap hash"),
        ("Japanese “no vacancy” button", "Japanese no vacancy button"),
    ],
)
def test_labels_become_readable_names(label, expected):
    assert readable(label) == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "blank"),
        ('<rect width="50" height="50" fill="#fefefe"/>', "blank"),
        ("<rect", "not drawable"),
        ('<image href="other.png" width="9" height="9"/>', "refers to a file"),
        ('<text x="1" y="9">word</text>', "needs fonts"),
        ('<rect width="99" height="2"/>', "a ribbon"),
        ('<rect width="1" height="1"/>', "small on its page"),
    ],
)
def test_what_cannot_be_drawn_says_why(body, reason):
    with pytest.raises(BadSampleError) as caught:
        render_page(f'{ROOT} width="100" height="100">{body}</svg>', 48)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("svg", "reason"),
    [
        (f'<!DOCTYPE svg [<!ENTITY a "b">]>{ROOT} width="9" height="9"/>', "declares entities"),
        (f'{ROOT} width="9" height="9"><!--{"x" * 2**21}--></svg>', "too large"),
    ],
)
def test_svgs_without_bound_are_refused(svg, reason):
    with pytest.raises(BadSampleError) as caught:
        render_icon(svg, 48)
    assert caught.value.reason == reason


def test_a_drawing_lies_in_the_middle_whatever_its_page():
    pixels = render_page(f'{ROOT} width="400pt" height="100pt"><rect x="9" y="9" width="80" height="40"/></svg>', 100)
    inked = pixels[..., 0] < 128
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    assert abs(columns[0] + columns[-1] - 99) <= 1
    assert abs(rows[0] + rows[-1] - 99) <= 1
    assert 92 <= columns[-1] - columns[0] + 1 <= 95
    assert (columns[-1] - columns[0]) / (rows[-1] - rows[0]) == pytest.approx(2, abs=0.1)


def test_a_png_larger_than_an_emoji_is_refused():
    large = io.BytesIO()
    Image.new("RGB", (600, 600)).save(large, "PNG")
    with pytest.raises(BadSampleError) as caught:
        render_png(large.getvalue(), 48)
    assert caught.value.reason == "too_large"


def test_a_package_of_other_bytes_is_refused(packed, tmp_path):
    package = packed[1]["emojilib"]
    (tmp_path / package.file).write_bytes(npm({"dist/emoji-en-US.json": {}}))
    with pytest.raises(OpenVisionError, match=r"is not emojilib 4\.0\.3.*remove it"):
        Packages(tmp_path, packed[1], offline=True).path("emojilib")


def test_offline_a_missing_package_is_named(tmp_path):
    with pytest.raises(OpenVisionError, match=r"emojilib-4\.0\.3\.tgz is not in .*--offline"):
        Packages(tmp_path, committed_packages(), offline=True).path("emojilib")


@pytest.mark.parametrize(("short", "client"), [("emojilib", "npm"), ("fashion-mnist", "apt-get")])
def test_a_missing_client_is_named_with_the_remedy(short, client, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OpenVisionError, match=f"fetched by {client}, which is not installed; install .* or copy"):
        Packages(tmp_path, committed_packages()).path(short)


def fake_npm(folder: Path, script: str) -> None:
    client = folder / "npm"
    client.write_text(f"#!/bin/sh\n{script}\n")
    client.chmod(client.stat().st_mode | stat.S_IEXEC)


def test_a_package_is_fetched_by_its_pinned_version_and_kept(packed, tmp_path, monkeypatch):
    folder, table = packed
    package = table["noto"]
    clients, cache = tmp_path / "clients", tmp_path / "cache"
    clients.mkdir()
    fake_npm(clients, f'echo "$@" > {tmp_path}/asked; cp {folder / package.file} .')
    monkeypatch.setenv("PATH", f"{clients}:/usr/bin:/bin")
    path = Packages(cache, table).path("noto")
    assert path == cache / package.file
    assert (tmp_path / "asked").read_text() == "pack @iconify-json/noto@1.2.9 --ignore-scripts\n"
    assert [file.name for file in cache.iterdir()] == [package.file]
    assert Packages(cache, table, offline=True).path("noto") == path


def test_what_a_client_complains_about_is_passed_on(packed, tmp_path, monkeypatch):
    fake_npm(tmp_path, "echo no such host >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(OpenVisionError, match=r"failed: no such host; check the network, or copy .*\.tgz into"):
        Packages(tmp_path / "cache", packed[1]).path("noto")


@pytest.mark.parametrize("data", [b"<html>not found</html>", debian({})[:68], b"!<arch>\n" + b"x" * 60])
def test_what_is_no_debian_package_is_one_clear_error(data, packed, tmp_path):
    package = packed[1]["openclipart"]
    (tmp_path / package.file).write_bytes(data)
    table = {"openclipart": replace(package, sha512=hashlib.sha512(data).hexdigest())}
    with pytest.raises(OpenVisionError, match=r"cannot be read.*remove it"):
        list(Packages(tmp_path, table, offline=True).members("openclipart", lambda name: True))


def test_every_committed_package_is_pinned_under_an_open_licence():
    table = committed_packages()
    assert {style.name for style in STYLES} <= set(table)
    for package in table.values():
        assert package.licence in ("Apache-2.0", "MIT", "CC BY 4.0", "CC BY-SA 4.0", "public domain")
        assert len(bytes.fromhex(package.sha512)) == 64
        assert package.version in package.file.replace("%3a", ":")


def test_the_command_says_what_is_missing(tmp_path):
    result = CliRunner().invoke(app, ["picto", str(tmp_path / "set"), "--packages", str(tmp_path), "--offline"])
    assert isinstance(result.exception, OpenVisionError)
    assert "--offline" in str(result.exception)
    assert not (tmp_path / "set").exists()


@pytest.mark.slow
def test_the_real_set(tmp_path):
    """Needs npm, apt-get and a network the first time; the packages stay in the cache folder."""
    folder = make_picto(tmp_path / "picto")
    sets = {split: ShardDataset(folder / split) for split in ("train", "validation_style", "heldout_style")}
    held = ShardDataset(folder / HELDOUT_CONCEPTS)
    assert sum(map(len, sets.values())) + len(held) > 20_000
    assert len(ShardDataset(folder / "fashion_mnist")) == 10_000
    concepts = {split: {sample.meta["concept"] for sample in data} for split, data in sets.items()}
    assert not {sample.meta["concept"] for sample in held} & set.union(*concepts.values())
    # What is asked of a style never trained on has been seen in others.
    for split in ("validation_style", "heldout_style"):
        assert len(concepts[split] & concepts["train"]) > 0.95 * len(concepts[split])

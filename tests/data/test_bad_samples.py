"""One bad sample of a stranger is counted, by the same reason in every command, and ends none of them."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.recap.index import tar_samples
from openvision.data.shards.dataset import ShardDataset, unpack_images
from openvision.data.shards.index import ShardIndex, build_index, is_key
from openvision.data.shards.store import LocalStore
from openvision.data.tools.readers import Columns, table_rows
from openvision.data.tools.stats import gather
from openvision.data.tools.verify import verify
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import captioned_shards
from openvision.images.decode import BadSampleError, decode_image, read_header
from openvision.inference.embed import images_of
from openvision.text.tokenizer import Tokenizer
from tests.data.strangers import encoded, good, sample, write_tar

FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "600"))
BAD_FIELDS = {
    b'{"synthetic": 7}': "bad_text",
    b'{"synthetic": true}': "bad_text",
    b'{"synthetic": {"a": 1}}': "bad_text",
    b'{"synthetic": [1]}': "bad_text",
    b'{"synthetic": [null]}': "bad_text",
    b'{"synthetic": "\\ud800 lone"}': "bad_text",
    b"[" * 100_000: "bad_json",
    b"[1]": "bad_json",
    b"{": "bad_json",
    b"\xff\xfe\xfd": "bad_json",
}
TOKENIZER = Tokenizer.train(["ramp", "A ramp. It is grey."], 60)


def rejected_in_training(folder: Path) -> Counter[str]:
    """Reasons in two epochs of the loader, each key once."""
    dataset = ShardDataset(folder)
    options = LoaderOptions(reject_budget=1.0, distinct=False)
    spec = InputSpec(resolution=16, context_length=8, caption_length=8)
    found: dict[str, str] = {}
    with Loader(dataset, TOKENIZER, spec, batch_size=len(dataset), seed=0, options=options) as loader:
        for batch in (next(loader), next(loader)):
            found |= {reject.key: reject.reason for reject in batch.rejects}
    return Counter(found.values())


def test_bad_texts_are_counted_alike_everywhere(tmp_path):
    bad = [member for number, meta in enumerate(BAD_FIELDS) for member in sample(f"b{number}", meta)]
    write_tar(tmp_path / "shards", good(30) + bad)
    dataset = ShardDataset(tmp_path / "shards")
    reasons = Counter(BAD_FIELDS.values())
    unpacked: Counter[str] = Counter()
    assert verify(tmp_path / "shards").reasons == reasons
    assert gather(dataset).rejected == reasons
    assert unpack_images(dataset, tmp_path / "images", unpacked) == 30
    assert unpacked == reasons
    assert rejected_in_training(tmp_path / "shards") == reasons
    # Encoding and evaluation load the image of a bad sample no more than training does.
    images = images_of(tmp_path / "shards")
    evaluated = captioned_shards(tmp_path / "shards", "synthetic").images
    for load in (images.load, evaluated.load):
        found: Counter[str] = Counter()
        for index in range(len(dataset)):
            try:
                load(index)
            except BadSampleError as error:
                found[error.reason] += 1
        assert found == reasons


def test_bad_images_are_counted_alike_everywhere(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    broken = [b"", b"GIF89a", encoded()[:80], postscript, b"\x89PNG\r\n\x1a\n"]
    members = [member for number, data in enumerate(broken) for member in sample(f"b{number}", image=data)]
    write_tar(tmp_path, good(20) + members)
    assert verify(tmp_path).reasons == {"undecodable": 5}
    assert rejected_in_training(tmp_path) == {"undecodable": 5}
    # Its header is whole: statistics read no more.
    assert gather(ShardDataset(tmp_path)).rejected == {"undecodable": 4}


@pytest.mark.parametrize("error", [RuntimeError, TypeError, KeyError, IndexError, MemoryError, RecursionError])
def test_whatever_a_decoder_raises_is_a_bad_image(monkeypatch, error):
    def fail(*args: object) -> None:
        raise error("damaged")

    data = encoded("BMP")
    monkeypatch.setattr("PIL.Image.Image.convert", fail)
    with pytest.raises(BadSampleError, match="damaged") as raised:
        decode_image(data)
    assert raised.value.reason == "undecodable"


def test_train_tells_what_the_index_left_out_and_stats_too(tmp_path):
    write_tar(tmp_path, [*good(2), ("anim.gif", b"GIF89a"), ("anim.txt", b"a")])
    result = CliRunner().invoke(app, ["data", "stats", str(tmp_path)])
    assert "left out, unsupported_image: 1" in result.output


def test_unpack_stays_in_its_folder_and_verify_prints_no_escapes(tmp_path):
    evil = "\x1b]0;owned\x07"
    members = [
        *sample("../../out/one", b'{"name": "..."}'),
        *sample("/out/two", b'{"name": ""}'),
        *sample("a", b'{"name": "r"}'),
        *sample("r/../../../out/three", b'{"name": "r"}'),
        *sample("b", b'{"name": {"a": 1}}'),
        *sample(evil, b'{"synthetic": 7}'),
    ]
    write_tar(tmp_path / "in/shards", members)
    result = CliRunner().invoke(app, ["data", "unpack", str(tmp_path / "in/shards"), str(tmp_path / "in/images")])
    assert result.exit_code == 0
    assert "left out, bad_text: 1" in result.output
    names = sorted(path.name for path in (tmp_path / "in/images").iterdir())
    assert names == ["b.png", "out-one.png", "out-two.png", "r-r-..-..-..-out-three.png", "r.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    result = CliRunner().invoke(app, ["data", "verify", str(tmp_path / "in/shards")])
    assert "\\x1b]0;owned\\x07" in result.output
    assert "\x1b" not in result.output


def test_rows_of_a_table_that_are_no_texts_are_rejected(tmp_path):
    lines = [
        {"image": "a.png", "text": "fine"},
        {"image": "a.png", "text": {"a": 1}},
        {"image": "a.png", "text": [["deep"]]},
    ]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines) + "[" * 100_000 + "\n")
    rows = list(table_rows(table, Columns()))
    assert [row.reason if isinstance(row, BadSampleError) else row.alts for row in rows] == [
        ["fine"],
        "bad_text",
        "bad_text",
        "bad_row",
    ]


# Bytes of strangers, drawn: whole structures with odd values, and good files with a few bytes changed.
TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = ["synthetic", "alt", "name", "sha256", "key", "url"]
FIELDS = st.dictionaries(st.sampled_from(KEYS) | TEXT, VALUE, max_size=4)


@st.composite
def changed(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """One of the files, with some bytes replaced, put in, or cut off."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        new = draw(st.binary(max_size=8))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "insert", "cut"]))
        if kind == "cut":
            del data[at:]
        else:
            data[at : at + (len(new) if kind == "replace" else 0)] = new
    return bytes(data)


ENCODED = FIELDS.map(lambda fields: json.dumps(fields).encode())
JSON = ENCODED | changed([b'{"synthetic": ["a", "\\u0041"], "name": "x"}'])
KINDS_OF_IMAGE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "ICO")
IMAGE = st.binary(max_size=64) | changed([encoded(kind) for kind in KINDS_OF_IMAGE])
ODD_NAMES = ["a/../b.png", "/x.png", ".png", "é.json", "k" * 300 + ".png", "../g.webp", "G000.png", "a/b.c/d.jpg"]
# A tar stores bytes; lone surrogates other than those of bytes that are not UTF-8 cannot be written.
STORED = TEXT.map(lambda name: name.encode("utf-8", "ignore")) | st.binary(max_size=8)
WRITTEN = STORED.filter(lambda name: b"\0" not in name).map(lambda name: name.decode("utf-8", "surrogateescape"))
NAME = WRITTEN | st.sampled_from(ODD_NAMES)


def error_of(call: Callable[[], object]) -> OpenVisionError | None:
    """The error that a user would see; any other is a defect and passes."""
    try:
        call()
    except OpenVisionError as error:
        return error
    return None


def check_json(folder: Path, meta: bytes) -> None:
    """A sample with any json is read or bad, for every reader; one that is read can be tokenized and stored."""
    write_tar(folder, [*good(1), *sample("x", meta)])
    dataset = ShardDataset(folder)
    error = error_of(lambda: dataset[1])
    reasons = {error.reason: 1} if isinstance(error, BadSampleError) else {}
    assert error is None or reasons.keys() <= {"bad_json", "bad_text"}
    assert verify(folder).reasons == reasons
    if error is None:
        texts = [dataset[1].synthetic or "", dataset[1].alt]
        TOKENIZER.encode([text for found in texts for text in ([found] if isinstance(found, str) else found)], 8)
    gather(dataset)
    unpack_images(dataset, folder / "images")
    captioned_shards(folder)
    for one in tar_samples(LocalStore(folder), "000000.tar"):
        fields = one.meta()
        assert fields is None or one.identities(fields)["hash"]


def check_image(folder: Path, data: bytes) -> None:
    """An image decodes, or is bad; its header too."""
    for read in (decode_image, read_header):
        error = error_of(partial(read, data))
        assert error is None or (isinstance(error, BadSampleError) and error.reason in ("undecodable", "too_large"))


def check_tar(folder: Path, data: bytes) -> None:
    """A changed tar shows or counts every sample that it held, alike for both readers, or says that it is damaged.

    The checksum of a header is a sum: a changed name may keep it, and is then a name like any other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "000000.tar").write_bytes(data)
    store = LocalStore(folder)
    if error := error_of(lambda: build_index(store, "000000.tar")):
        assert "000000.tar" in str(error)
        return
    (folder / "000000.index").write_bytes(build_index(store, "000000.tar"))
    shard = ShardIndex(store, "000000.tar")
    shown, counted = set(shard.keys()), {key for key, _ in shard.info.rejected}
    assert {"g000", "g001", "g002", "g003"} <= shown | counted
    assert {one.key for one in tar_samples(store, "000000.tar") if is_key(one.key)} == shown


@pytest.mark.parametrize("name", [b"0g00.png", b".000gpng", b"g0\x1d/\xdbpng+<"])
def test_a_renamed_member_that_keeps_the_checksum_is_counted(tmp_path, name):
    data = write_tar(tmp_path, good(4)).read_bytes()
    check_tar(tmp_path, name + data[len(name) :])
    assert verify(tmp_path).reasons["no_image"]


def check_names(folder: Path, names: list[str]) -> None:
    """Members of any names: every key is a sample or counted, and unpacking stays inside."""
    write_tar(folder / "shards", [*good(1), *((name, encoded()) for name in names)])
    dataset = ShardDataset(folder / "shards")
    assert len(dataset) >= 1
    before = sorted(folder.rglob("*"))
    written = unpack_images(dataset, folder / "images")
    after = [path for path in sorted(folder.rglob("*")) if path not in before and path != folder / "images"]
    assert len(after) == written
    assert {path.parent for path in after} == {folder / "images"}


def whole_tar(folder: Path) -> bytes:
    return write_tar(folder, good(4)).read_bytes()


def fuzzed(kind: str, folder: Path) -> tuple[Callable[[Path, Any], None], SearchStrategy]:
    """The check of a kind of input, and what draws such inputs."""
    return {
        "json": (check_json, JSON),
        "image": (check_image, IMAGE),
        "tar": (check_tar, changed([whole_tar(folder / "whole")])),
        "names": (check_names, st.lists(NAME, max_size=4)),
    }[kind]


def hunt(kind: str, folder: Path, examples: int, first_seed: int) -> None:
    """Try `examples` inputs of a kind, each in a folder of its own."""
    check, strategy = fuzzed(kind, folder)
    numbers = iter(range(10**9))

    @seed(first_seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(strategy)
    def tried(value: object) -> None:
        check(folder / f"{first_seed}-{next(numbers)}", value)

    tried()


KINDS = ("json", "image", "tar", "names")


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(kind, tmp_path):
    hunt(kind, tmp_path, {"json": 25, "image": 200, "tar": 60, "names": 25}[kind], 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fuzz_for_long(kind, tmp_path):
    """FUZZ_SECONDS in all (600), a quarter for each kind."""
    end, tried = time.monotonic() + FUZZ_SECONDS / len(KINDS), 0
    while time.monotonic() < end:
        tried += 1
        hunt(kind, tmp_path / str(tried), 100, tried)
    assert tried
    print(f"{kind}: {100 * tried} inputs")

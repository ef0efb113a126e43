"""Public reports about shards, captions, tables and loaders, tried on ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.batch import Batch
from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.recap.index import tar_samples
from openvision.data.shards.dataset import ShardDataset
from openvision.data.shards.index import split_member_name
from openvision.data.shards.store import LocalStore
from openvision.data.tools.make import make_shards
from openvision.data.tools.readers import Columns, folder_rows, table_rows
from openvision.data.tools.verify import verify
from openvision.errors import OpenVisionError
from openvision.evaluation.data.options import TextOptions, open_captioned
from openvision.images.decode import BadSampleError, decode_image, has_gray_tail
from openvision.inference.embed import images_of
from openvision.recipe.sections import Data, Source
from openvision.text.tokenizer import Tokenizer
from openvision.training.setup.data import describe_unused, open_training_data
from tests.data.strangers import encoded, good, sample, write_tar

TOKENIZER = Tokenizer.train(["ramp", "A ramp. It is grey."], 60)
SPEC = InputSpec(resolution=16, context_length=8, caption_length=8)


def batches(source: Path | str, count: int, size: int, **options) -> list[Batch]:
    loader = Loader(ShardDataset(source), TOKENIZER, SPEC, batch_size=size, seed=0, options=LoaderOptions(**options))
    with loader:
        return [next(loader) for _ in range(count)]


def test_member_names_in_capitals(tmp_path):
    """huggingface/datasets#7732: suffixes in capitals raised a KeyError."""
    members = [
        ("0001.JPG", encoded("JPEG")),
        ("0001.TXT", b"one"),
        ("0002.Jpeg", encoded("JPEG")),
        ("0002.Json", b"{}"),
    ]
    write_tar(tmp_path, [*members, ("0002.Txt", b"two")])
    assert [(one.key, one.alt) for one in ShardDataset(tmp_path)] == [("0001", "one"), ("0002", "two")]


def test_dots_in_names_split_where_webdataset_splits(tmp_path):
    """huggingface/datasets#7150, webdataset/webdataset#237: dots in keys made every reader split elsewhere."""
    names = {
        "d.v1/22.05.png": ("d.v1/22", "05.png"),
        "./a/b/0001.jpg": ("a/b/0001", "jpg"),
        "x.left.jpg": ("x", "left.jpg"),
    }
    assert {name: split_member_name(name) for name in names} == names
    write_tar(
        tmp_path, [*good(1), ("./a.b/0001.png", encoded()), ("./a.b/0001.txt", b"ramp"), ("x.left.png", encoded())]
    )
    dataset = ShardDataset(tmp_path)
    assert [dataset.key(index) for index in range(2)] == ["g000", "a.b/0001"]
    assert [one.key for one in tar_samples(LocalStore(tmp_path), "000000.tar")] == ["g000", "a.b/0001"]
    # An unknown suffix is counted, by the index and by verify alike.
    assert dataset.left_out == verify(tmp_path).reasons == {"no_image": 1}


def test_captions_under_another_name_are_an_error_at_once(tmp_path):
    """mlfoundations/open_clip#1016: with captions in the json alone every sample was dropped, and training hung."""
    members = [
        (f"{n}.{kind}", data) for n in range(4) for kind, data in (("png", encoded()), ("json", b'{"caption": "a"}'))
    ]
    write_tar(tmp_path / "train", members)
    data = Data(train="train", vocab_size=50)
    with pytest.raises(OpenVisionError, match="no captions named 'txt'; known are caption"):
        open_training_data(data, tmp_path, reads_synthetic=False)
    found = open_training_data(Data(train="train", alt_key="caption", vocab_size=50), tmp_path, reads_synthetic=False)
    assert found.sources[0][0].alt == "a"


CAPTIONS = {
    b'{"synthetic": ["a", "b"]}': (["a", "b"], ()),
    b'{"synthetic": ["a", null, " "]}': (["a"], ("null_in_list",)),
    b'{"synthetic": null}': (None, ()),
    b'{"synthetic": ""}': ("", ()),
    b"{}": (None, ()),
    b'\xef\xbb\xbf{"synthetic": "a"}': ("a", ()),
    b'{"synthetic": 42}': "bad_text",
    b'{"synthetic": [null]}': "bad_text",
    b'{"synthetic": ["a", 42]}': "bad_text",
    b'{"synthetic": ': "bad_json",
}


@pytest.mark.parametrize("meta", CAPTIONS)
def test_captions_of_any_type_are_used_or_counted(meta, tmp_path):
    """mlfoundations/open_clip, JsonCaptionExtractor: lists, nulls and numbers became "" and vanished uncounted."""
    write_tar(tmp_path, [*good(1), *sample("x", meta)])
    expected = CAPTIONS[meta]
    found = verify(tmp_path)
    if isinstance(expected, str):
        assert found.reasons == {expected: 1}
        with pytest.raises(BadSampleError):
            ShardDataset(tmp_path)[1]
    else:
        read = ShardDataset(tmp_path)[1]
        assert (read.synthetic, read.remarks) == expected
        assert not found.findings
        assert [one.reason for one in found.suspicious] == list(expected[1])


def test_the_log_and_verify_say_which_texts_are_odd(tmp_path):
    """mlfoundations/open_clip#1151, beside it: texts of unknown words alone were trained on in silence."""
    members = [
        *sample("latin", text="ramp caf\xe9 \x85".encode("latin-1")),
        *sample("wide", text="ramp café".encode("utf-16")),
        *sample("chinese", b"{}", "猫".encode()),
        *sample("nulls", b'{"synthetic": ["A ramp.", null]}'),
    ]
    shards = tmp_path / "shards"
    write_tar(shards, members)
    texts = {one.key: one.alt for one in ShardDataset(shards)}
    assert texts == {"latin": "ramp café …", "wide": "ramp café", "chinese": "猫", "nulls": "ramp"}
    TOKENIZER.save(tmp_path)
    listed = tmp_path / "list.jsonl"
    result = CliRunner().invoke(
        app, ["data", "verify", str(shards), "--tokenizer", str(tmp_path / "tokenizer.json"), "--rejects", str(listed)]
    )
    assert result.exit_code == 0
    assert "suspicious, not_utf8: 2" in result.output
    found = {(line["reason"], line["key"]) for line in map(json.loads, listed.read_text().splitlines())}
    odd = {("not_utf8", "latin"), ("not_utf8", "wide"), ("unknown_words", "chinese"), ("null_in_list", "nulls")}
    assert found == odd
    with Loader(ShardDataset(shards), TOKENIZER, SPEC, batch_size=4, seed=0) as loader:
        next(loader)
        lines = describe_unused(loader, 8, True)
    assert any(line.startswith("texts without a word of the vocabulary: 1 (chinese);") for line in lines)
    assert any("caption lists with nulls" in line and "(nulls)" in line for line in lines)
    assert any("not UTF-8" in line and ": 2 (" in line for line in lines)
    evaluated = open_captioned("shards", tmp_path, TextOptions())
    assert evaluated.texts[0] == "ramp café …"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("given", [False, True])
def test_tables_keep_captions_as_texts_and_find_their_delimiter(delimiter, given, tmp_path):
    """mlfoundations/open_clip#789: the default delimiter gave KeyError 'filepath'."""
    captions = ["NA", "None", "null", "1e5", "a, b; c", 'said "hi"', "two\nlines", "😀"]
    rows = [["filepath", "title"], *(["a.png", caption] for caption in captions)]
    quoted = (delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    table = tmp_path / "t.csv"
    table.write_text("\r\n".join(quoted), encoding="utf-8-sig", newline="")
    found = list(table_rows(table, Columns(), delimiter if given else None))
    assert [row if isinstance(row, BadSampleError) else row.alts for row in found] == [[text] for text in captions]


def test_captions_that_look_like_missing_values_reach_the_shards(tmp_path):
    """huggingface/transformers#28286: a caption "None" or "NA" was parsed as NaN and ended training."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image;text\na.png;None\na.png;NA\na.png;null\n")
    make_shards(table_rows(tmp_path / "t.csv", Columns()), tmp_path / "out")
    assert [one.alt for one in ShardDataset(tmp_path / "out" / "train")] == ["None", "NA", "null"]


def test_a_table_without_names_or_with_unknown_ones_says_so(tmp_path):
    """mlfoundations/open_clip#789, again: a message that names the columns and the option."""
    table = tmp_path / "t.csv"
    table.write_text("photo;words\na.png;x\n")
    with pytest.raises(OpenVisionError, match="--image-column; its columns are: photo, words"):
        list(table_rows(table, Columns()))
    assert [
        row.alts for row in table_rows(table, Columns("photo", "words")) if not isinstance(row, BadSampleError)
    ] == [["x"]]
    table.write_text("a.jpg;a cat\nb.jpg;a dog\n")
    with pytest.raises(OpenVisionError, match="no line of column names"):
        list(table_rows(table, Columns()))


def test_a_folder_counts_what_it_does_not_take(tmp_path):
    """mlfoundations/open_clip, data.py: files of other formats vanished uncounted."""
    folder = tmp_path / "cat"
    folder.mkdir()
    for name, form in (("a.JPG", "JPEG"), ("b.jfif", "JPEG"), ("c.avif", "AVIF"), ("d.gif", "GIF")):
        (folder / name).write_bytes(encoded(form))
    (folder / "a.TXT").write_bytes("caf\xe9".encode("latin-1"))
    for name in ("clip.MOV", "clip2.mov", "lonely.txt", "notes"):
        (folder / name).write_bytes(b"x")
    result = CliRunner().invoke(app, ["data", "make", str(tmp_path / "out"), "--folder", str(folder.parent)])
    assert result.exit_code == 0, result.output
    assert "files not taken: .mov 2, " in result.output
    made = json.loads((tmp_path / "out/make.json").read_text())
    assert made["not_taken"] == {".mov": 2, ".txt": 1, "no suffix": 1}
    assert made["suspicious"] == {"not_utf8": 1}
    texts = {one.meta["file"]: one.alt for one in ShardDataset(tmp_path / "out/train")}
    assert texts == {"cat/a.JPG": "café", "cat/b.jfif": "cat", "cat/c.avif": "cat", "cat/d.gif": "cat"}


def test_heic_is_read_with_its_extra_or_named(tmp_path):
    """ggml-org/llama.cpp#20870, a phone's format: HEIC is upright, or one sentence says what it needs."""
    heif = pytest.importorskip("pillow_heif", reason="extra heif")
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    heif.from_pillow(turned).save(tmp_path / "a.heic", quality=95, exif=exif.tobytes())
    assert np.abs(decode_image((tmp_path / "a.heic").read_bytes()).astype(int) - pixels).mean() < 8
    assert [row.place for row in folder_rows(tmp_path) if not isinstance(row, BadSampleError)] == [
        str(tmp_path / "a.heic")
    ]


def test_heic_without_its_extra_names_it():
    """ggml-org/llama.cpp#20870, the other side."""
    from openvision.images import decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_known_formats", lambda: ("PNG", "JPEG"))
        with pytest.raises(BadSampleError, match=r'pip install "openvision-encoders\[heif\]"') as caught:
            decode_image(b"\0\0\0\x18ftypheic" + bytes(40))
    assert caught.value.reason == "unsupported_image"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.75])
def test_half_gray_images_are_suspicious(share, tmp_path):
    """rom1504/img2dataset#224: 450,000 images of LAION-400M decode, but are gray from somewhere on."""
    noise = Image.effect_noise((96, 96), 80).convert("RGB")
    noise.save(tmp_path / "whole.jpg", quality=90)
    whole = (tmp_path / "whole.jpg").read_bytes()
    cut = whole[: int(len(whole) * share)].rstrip(b"\xff") + b"\xff\xd9"
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards", [*sample("cut", image=cut), *sample("whole", image=whole)])
    assert decode_image(cut).shape == (96, 96, 3)
    found = verify(tmp_path / "shards")
    assert [(one.reason, one.key) for one in found.suspicious] == [("gray_tail", "cut")]
    assert not found.findings
    # It is used: nothing is rejected for how it looks.
    assert sorted(batches(tmp_path / "shards", 1, 2)[0].keys) == ["cut", "whole"]


@pytest.mark.parametrize(
    ("colour", "rows", "suspicious"),
    [
        ((128, 128, 128), 24, True),
        ((128, 128, 128), 7, False),
        ((128, 128, 128), 96, False),
        ((140, 140, 140), 24, False),
    ],
)
def test_what_is_gray_for_another_reason_is_not_suspicious(colour, rows, suspicious):
    """rom1504/img2dataset#243: a whole gray image, a thin gray edge and another gray are no cut JPEG."""
    pixels = np.full((96, 40, 3), 200, np.uint8)
    pixels[96 - rows :] = colour
    assert has_gray_tail(pixels) is suspicious


def three_shards(folder: Path, *counts: int) -> None:
    for number, count in enumerate(counts):
        members = [part for row in range(count) for part in sample(f"s{number}-{row}")]
        write_tar(folder, members, f"{number:05d}.tar")


@pytest.mark.parametrize("processes", [2, 4])
def test_fewer_shards_than_processes_give_all_the_same_number_of_batches(processes, tmp_path):
    """webdataset/webdataset#225, roboflow/rf-detr#1396: unequal batch counts left processes waiting for ever."""
    three_shards(tmp_path, 7, 5, 1)
    per_rank = [batches(tmp_path, 5, 8, rank=rank, world_size=processes) for rank in range(processes)]
    assert all(len(found) == 5 and all(len(batch.keys) == 8 // processes for batch in found) for found in per_rank)
    alone = batches(tmp_path, 5, 8)
    for step, batch in enumerate(alone):
        assert [key for found in per_rank for key in found[step].keys] == batch.keys


@pytest.mark.parametrize("samples", [29, 32, 35])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_batch_is_full_and_no_sample_is_lost(samples, threads, tmp_path):
    """google/grain#1351: batches had wrong sizes once the data was divided among workers."""
    three_shards(tmp_path, samples)
    found = batches(tmp_path, -(-3 * samples // 4), 4, threads=threads)
    keys = [key for batch in found for key in batch.keys]
    assert all(len(batch.keys) == len(batch.images) == 4 for batch in found)
    for epoch in range(3):
        assert len(set(keys[epoch * samples : (epoch + 1) * samples])) == samples


def test_long_keys_survive_shared_memory(tmp_path):
    """google/grain#1328: texts from workers were cut to the length of the first one."""
    names = ["a", "b" * 60, "c" * 90, "d" * 30]
    write_tar(tmp_path, [part for name in names for part in sample(name, b'{"synthetic": ["a ramp", null]}')])
    (batch,) = batches(tmp_path, 1, 4, workers=1)
    assert sorted(batch.keys) == sorted(names)
    assert sorted(key for reason, key in batch.remarks if reason == "null_in_list") == sorted(names)


def test_resuming_with_other_processes_reads_every_sample_once(tmp_path):
    """huggingface/transformers#40245, Lightning-AI/litData#878: another world size lost or reread samples."""
    three_shards(tmp_path, 16)
    first = batches(tmp_path, 1, 4)[0].keys
    rest = []
    for rank in range(2):
        options = LoaderOptions(rank=rank, world_size=2)
        with Loader(ShardDataset(tmp_path), TOKENIZER, SPEC, batch_size=4, seed=0, start=4, options=options) as loader:
            rest += [key for _ in range(3) for key in next(loader).keys]
    assert sorted(first + rest) == sorted(f"s0-{row}" for row in range(16))


def test_brace_patterns_single_tars_and_lists_are_data(tmp_path):
    """mlfoundations/open_clip#179: what `--train-data` takes there, `{00000..00002}.tar`, is a source here."""
    three_shards(tmp_path / "a", 3, 2, 1)
    write_tar(tmp_path / "b", good(2), "extra.tar")
    pattern, base = "a/{00000..00001}.tar", str(tmp_path)
    assert len(ShardDataset(f"{base}/{pattern}")) == 5
    assert len(ShardDataset(f"{base}/a/00002.tar")) == 1
    across = f"{base}/a/0000{{0,2}}.tar::{base}/b/extra.tar"
    # The second time from the manifest that the first has written, whose shards lie in folders below.
    assert [len(ShardDataset(across)) for _ in range(2)] == [6, 6]
    # The folder's own manifest is another one, and both are found again.
    assert [len(ShardDataset(where)) for where in (f"{base}/a", f"{base}/{pattern}")] == [6, 5]
    assert len(images_of(Path(f"{base}/{pattern}")).keys) == 5
    checked = verify(Path(across))
    assert (checked.samples, checked.findings) == (6, [])
    assert len(open_captioned(pattern, tmp_path, TextOptions()).texts) == 5
    for train, samples in ((pattern, 5), ([pattern, "b/extra.tar"], 7)):
        found = open_training_data(Data.model_validate({"train": train, "vocab_size": 50}), tmp_path, True)
        assert len(found.sources[0]) == samples
    mixture = Data(train=(Source(folder=pattern), Source(folder="b")), vocab_size=50)
    assert [len(source) for source in open_training_data(mixture, tmp_path, True).sources] == [5, 2]
    tokenizer = ["tokenizer", "train", f"{base}/{pattern}", "-o", f"{base}/tokenizer", "--vocab-size", "120"]
    preview = ["data", "preview", f"{base}/{pattern}", "-o", f"{base}/page.html", "--views", "1"]
    says = {
        ("data", "stats", f"{base}/{pattern}"): "",
        ("data", "unpack", f"{base}/a/00002.tar", f"{base}/images"): "1 image",
        (*tokenizer,): "entries from 10 texts",
        (*preview,): "5 samples",
    }
    for command, said in says.items():
        result = CliRunner().invoke(app, list(command))
        assert result.exit_code == 0, result.output
        assert said in result.output
    assert len(batches(f"{base}/{pattern}", 1, 5)[0].keys) == 5


def test_remote_brace_patterns_are_data(tmp_path):
    """mlfoundations/open_clip#179, behind a URL."""
    import fsspec

    three_shards(tmp_path, 3, 2, 1)
    files = fsspec.filesystem("memory")
    for tar in tmp_path.glob("*.tar"):
        files.pipe_file(f"/replay-brace/{tar.name}", tar.read_bytes())
    pattern = "memory://replay-brace/{00000..00001}.tar"
    assert CliRunner().invoke(app, ["data", "index", pattern]).exit_code == 0
    assert len(ShardDataset(pattern)) == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{00000..00003}.tar", "00002.tar does not exist, and 1 more of 4"),
        ("{00001..00000}.tar", "ends before it begins"),
        ("{00000..00001.tar", "open brace"),
        ("{00000...1}.tar", "neither a range"),
        ("00000.tar::00000.tar", "twice"),
        ("00000.tar::more", "no .tar file"),
    ],
)
def test_patterns_that_name_nothing_are_one_sentence(source, message, tmp_path):
    """webdataset/webdataset#288: a pattern with a mistake opened nothing, or something else."""
    three_shards(tmp_path, 1, 1)
    with pytest.raises(OpenVisionError, match=message):
        open_training_data(Data(train=source, vocab_size=50), tmp_path, True)


def test_validation_is_turned_off_by_a_key():
    """mlfoundations/open_clip, `--val-data`: who has no validation data names none."""
    from openvision.recipe.schema import load_recipe

    recipe = load_recipe(Path("recipes/quickstart.toml"), ["data.validation=none"])
    assert recipe.data.validation is None

"""Encode, classify and search with a tiny random model; what goes wrong is one sentence."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.inference.encoder import Encoder, distinct_labels
from openvision.inference.vision import UnreadableImageError


def test_paths_images_and_arrays_give_the_same_vectors(encoder, pictures) -> None:
    path = pictures / "red.png"
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB"))
        vectors = encoder.encode_images([path, str(path), image, array], batch_size=3)
    assert vectors.shape == (4, 16)
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors[0], vectors[1])
    assert torch.allclose(vectors, vectors[:1].expand(4, -1), atol=1e-6)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1] * 4, abs=1e-5)


def test_transparency_palette_and_deep_grey_are_understood(encoder) -> None:
    white = np.full((20, 20, 3), 255, dtype=np.uint8)
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    palette = Image.fromarray(white).convert("P")
    deep = Image.fromarray(np.full((20, 20), 65535, dtype=np.uint16))
    vectors = encoder.encode_images([white, clear, palette, deep])
    assert torch.allclose(vectors, vectors[:1].expand(4, -1), atol=1e-6)


def test_nothing_gives_no_rows(encoder) -> None:
    assert encoder.encode_images([]).shape == (0, 16)
    assert encoder.encode_texts([]).shape == (0, 16)


def test_preparation_is_scale_and_central_crop(encoder) -> None:
    wide = np.zeros((64, 192, 3), dtype=np.uint8)
    wide[:, 64:128] = 200
    prepared = encoder.preprocess(wide)
    assert prepared.shape == (3, 32, 32)
    assert int(prepared[:, :, 4:-4].min()) == 200


def test_classify_is_a_softmax_of_scaled_cosines(encoder, pictures) -> None:
    path = pictures / "red.png"
    labels = ["a red picture", "something", "a green picture"]
    result = encoder.classify(path, labels)
    image, texts = encoder.encode_images([path])[0], encoder.encode_texts(labels)
    expected = torch.softmax(texts @ image * encoder.scale, dim=0).tolist()
    assert dict(result) == pytest.approx(dict(zip(labels, expected, strict=True)), abs=1e-4)
    shares = [share for _, share in result]
    assert shares == sorted(shares, reverse=True)
    assert math.fsum(shares) == pytest.approx(1)
    assert encoder.scale == pytest.approx(1 / 0.07, rel=1e-5)


def test_the_order_of_labels_does_not_matter(encoder, pictures) -> None:
    forward = encoder.classify(pictures / "red.png", ["red", "green", "blue"])
    backward = encoder.classify(pictures / "red.png", ["blue", "green", "red"])
    assert dict(forward) == pytest.approx(dict(backward))


def test_labels_are_stripped_and_counted_once() -> None:
    assert distinct_labels([" red", "red ", "", "a b"]) == ["red", "a b"]


@pytest.mark.parametrize("labels", [[], ["", "  "]])
def test_no_labels_is_an_error(encoder, pictures, labels) -> None:
    with pytest.raises(OpenVisionError, match="no labels"):
        encoder.classify(pictures / "red.png", labels)


def test_one_text_where_a_list_is_meant_is_an_error(encoder, pictures) -> None:
    with pytest.raises(OpenVisionError, match="list"):
        encoder.classify(pictures / "red.png", "red,green")
    with pytest.raises(OpenVisionError, match="list"):
        encoder.encode_texts("red")
    with pytest.raises(OpenVisionError, match="list"):
        encoder.encode_images(pictures / "red.png")


def test_search_ranks_by_cosine_and_looks_into_subfolders(encoder, pictures) -> None:
    hits = encoder.search(pictures, "a red picture", top=10)
    assert {path.name for path, _ in hits} == {"red.png", "green.png", "blue.png"}
    text = encoder.encode_texts(["a red picture"])[0]
    for path, score in hits:
        assert score == pytest.approx(float(encoder.encode_images([path])[0] @ text), abs=1e-5)
    scores = [score for _, score in hits]
    assert scores == sorted(scores, reverse=True)
    assert encoder.search(pictures, "a red picture", top=1) == hits[:1]


def test_search_skips_what_it_cannot_read_and_says_so(encoder, pictures) -> None:
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    result = encoder.search_folder(pictures, "red")
    assert len(result.hits) == 3
    assert [path.name for path, _ in result.skipped] == ["broken.jpg"]


def test_search_tells_how_far_it_is(encoder, pictures) -> None:
    told: list[tuple[int, float]] = []
    result = encoder.search_folder(pictures, "red", 10, 2, lambda done, share: told.append((done, share)))
    files = len(result.hits) + len(result.skipped)
    assert [done for done, _ in told] == [*range(2, files, 2), files]
    assert [share for _, share in told] == [done / files for done, _ in told]
    assert result.hits == encoder.search_folder(pictures, "red", 10, 2).hits


def test_search_with_nothing_to_find(encoder, pictures, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(OpenVisionError, match="has no images"):
        encoder.search(empty, "red")
    with pytest.raises(OpenVisionError, match="not a folder"):
        encoder.search(tmp_path / "missing", "red")
    with pytest.raises(OpenVisionError, match="query is empty"):
        encoder.search(pictures, " ")
    with pytest.raises(OpenVisionError, match="top must be"):
        encoder.search(pictures, "red", top=0)
    (empty / "broken.png").write_bytes(b"")
    with pytest.raises(OpenVisionError, match="none of the 1 images"):
        encoder.search(empty, "red")


def test_bad_pictures_are_told_by_name(encoder, tmp_path) -> None:
    with pytest.raises(UnreadableImageError, match=r"missing\.png does not exist"):
        encoder.encode_images([tmp_path / "missing.png"])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(UnreadableImageError, match=r"broken\.png cannot be used"):
        encoder.encode_images([broken])
    with pytest.raises(UnreadableImageError, match="cannot be read"):
        encoder.encode_images([tmp_path])
    with pytest.raises(OpenVisionError, match="RGB uint8"):
        encoder.encode_images([np.zeros((8, 8, 3), dtype=np.float32)])


def test_a_missing_checkpoint_is_told(tmp_path) -> None:
    with pytest.raises(OpenVisionError, match="does not exist"):
        Encoder.load(tmp_path / "nothing")

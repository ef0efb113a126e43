"""Features of a frozen encoder on disk: keyed by content and encoder, whole after kill -9, equal to the tower's."""

import json
import pickle
import shutil

import pytest
import torch

from openvision.errors import OpenVisionError
from openvision.multimodal.data.dataset import ConversationDataset, read_llava_json
from openvision.multimodal.data.feature_cache import CachedTower, FeatureCache, encoder_key, patch_features
from openvision.multimodal.data.images import ImageFile, ImageSourceError
from openvision.multimodal.model.generate import load_assistant
from openvision.multimodal.model.geometry import Aspect
from tests.multimodal import tiny


class Subject:
    """A model, data and a cache folder of their own."""

    def __init__(self, model_folder, data_folder, folder) -> None:
        self.assistant = load_assistant(model_folder, "cpu")
        self.data = shutil.copytree(data_folder, folder / "data")
        samples = read_llava_json([self.data / "train.json"], self.data / "images").samples
        self.images = [image for sample in samples for image in sample.images]
        self.aspect: Aspect = "anyres" if self.assistant.geometry.pinpoints else "pad"
        processor, geometry = self.assistant.processor, self.assistant.geometry
        self.dataset = ConversationDataset(samples, processor, geometry, self.aspect, 600)
        self.folder = folder / "features"

    def key(self, dtype=torch.float32) -> str:
        return encoder_key(self.assistant.model, self.assistant.processor, dtype)

    def open(self, dtype=torch.float32) -> FeatureCache:
        return FeatureCache(self.folder, self.key(dtype), self.assistant.geometry, dtype)

    def fill(self, cache: FeatureCache) -> int:
        """Returns how many images the tower encoded."""
        missing = [(key, self.images[row]) for key, row in cache.missing(self.images, self.aspect)]
        seen = []

        def tower(pixels):
            seen.append(len(pixels))
            return patch_features(self.assistant.model, pixels)

        cache.fill(missing, self.dataset.pixels, tower, lambda done, share: None)
        return sum(seen)


@pytest.fixture
def subject(model_folder, data_folder, tmp_path) -> Subject:
    return Subject(model_folder, data_folder, tmp_path)


@pytest.mark.parametrize("folder", ["model_folder", "next_folder"])
def test_features_are_the_towers(request, data_folder, tmp_path, folder) -> None:
    subject = Subject(request.getfixturevalue(folder), data_folder, tmp_path)
    cache = subject.open()
    subject.fill(cache)
    for source in subject.images:
        features, size = cache.read(source, subject.aspect)
        image = source.open()
        assert size == (image.height, image.width)
        assert len(features) == subject.assistant.geometry.squares(*size)
        alone = patch_features(subject.assistant.model, subject.dataset.pixels(image))
        torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-5)


def test_what_is_there_is_not_computed_again(subject) -> None:
    assert subject.fill(subject.open()) == 12
    assert subject.fill(subject.open()) == 0
    # Another place, same content; another content, same place.
    moved = subject.images[0].path.rename(subject.data / "moved.png")
    assert subject.open().missing([ImageFile(moved)], "pad") == []
    shutil.copy(subject.images[1].path, subject.images[2].path)
    moved.write_bytes(moved.read_bytes() + b" ")
    assert len(subject.open().missing([ImageFile(moved)], "pad")) == 1
    assert subject.open().missing([subject.images[2]], "pad") == []


def test_equal_images_are_computed_once(subject) -> None:
    shutil.copy(subject.images[0].path, subject.images[1].path)
    assert subject.fill(subject.open()) == 11


def test_padded_and_cropped_images_differ(subject) -> None:
    cache = subject.open()
    subject.fill(cache)
    assert len(cache.missing(subject.images, "crop")) == 12


def test_another_encoder_layer_preprocessing_or_dtype_is_another_cache(subject) -> None:
    key = subject.key()
    assert key == subject.key()
    assert key != subject.key(torch.bfloat16)
    model = subject.assistant.model
    model.config.vision_feature_layer = -1
    assert key != subject.key()
    model.config.vision_feature_layer = -2
    subject.assistant.processor.image_processor.resample = 0
    assert key != subject.key()
    subject.assistant.processor.image_processor.resample = 2
    assert key == subject.key()
    with torch.no_grad():
        model.model.vision_tower.embeddings.cls_token[0, 0, 0] += 1e-3
    assert key != subject.key()


def test_training_elsewhere_keeps_the_cache(subject) -> None:
    key = subject.key()
    with torch.no_grad():
        subject.assistant.model.model.multi_modal_projector.linear_1.weight.add_(1)
    assert key == subject.key()


def test_files_are_whole_or_absent(subject) -> None:
    cache = subject.open()
    subject.fill(cache)
    assert [path.suffix for path in cache.folder.iterdir() if path.suffix not in (".safetensors", ".jsonl")] == []
    file = next(cache.folder.glob("*.safetensors"))
    # A crash cuts the list of hashes short: the last line is hashed again.
    listing = cache.folder / "images.jsonl"
    listing.write_text(listing.read_text()[:-10])
    assert subject.open().missing(subject.images, "pad") == []
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(OpenVisionError, match="is damaged"):
        subject.open()


def test_hashes_that_an_earlier_version_listed_are_read(subject, monkeypatch) -> None:
    cache = subject.open()
    subject.fill(cache)
    (cache.folder / "images.jsonl").rename(cache.folder / "pictures.jsonl")

    def refuse(_image: ImageFile) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(ImageFile, "digest", refuse)
    assert subject.open().missing(subject.images, "pad") == []


def test_broken_and_vanished_pictures(subject) -> None:
    subject.images[0].path.write_bytes(b"no picture")
    subject.images[1].path.unlink()
    cache = subject.open()
    assert subject.fill(cache) == 10
    for source in subject.images[:2]:
        with pytest.raises(ImageSourceError):
            cache.read(source, "pad")


def test_a_disk_that_is_too_small(subject, monkeypatch) -> None:
    cache = subject.open()
    needed = cache.bytes_for(12)
    assert needed == 12 * 25 * 48 * 4
    usage = type("Usage", (), {"free": needed - 1})
    monkeypatch.setattr("openvision.multimodal.data.feature_cache.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OpenVisionError, match=r"need up to .* GB"):
        subject.fill(cache)


def test_workers_open_files_themselves(subject) -> None:
    cache = subject.open()
    subject.fill(cache)
    cache.read(subject.images[0], "pad")
    again = pickle.loads(pickle.dumps(cache))
    features, _ = again.read(subject.images[0], "pad")
    assert torch.equal(features, cache.read(subject.images[0], "pad")[0])


def test_the_stand_in_returns_what_it_is_given() -> None:
    features = torch.randn(3, 1, 25, 48)
    states = CachedTower(1, 3, 8)(features, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert torch.equal(states[-2][:, 1:], features[:, 0])
    assert torch.equal(CachedTower(0, 3, 8)(features).hidden_states[-2], features[:, 0])


def test_anyres_disk_is_that_of_the_largest_grid(next_folder, data_folder, tmp_path) -> None:
    cache = Subject(next_folder, data_folder, tmp_path).open()
    assert cache.bytes_for(2) == 2 * 5 * 25 * 48 * 4
    assert json.dumps(tiny.VISION.grid()) == "[5, 5]"

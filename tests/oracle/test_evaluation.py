"""Our numbers against open_clip's and clip_benchmark's own functions, to the last digit, on the same weights."""

# pyright: reportMissingImports=false

import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from open_clip_train import zero_shot as open_clip_zero_shot
from open_clip_train.train import get_clip_metrics
from safetensors.torch import save_file

from openvision.encoding import encode_images, text_encoder
from openvision.evaluation.data.prompts import class_names, classifier, protocol
from openvision.evaluation.evaluators.retrieval import retrieve
from openvision.evaluation.evaluators.zero_shot import answers, summarize
from openvision.evaluation.metrics.ranks import retrieval_ranks
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig, normalize
from openvision.text.tokenizer import Tokenizer
from openvision.weights.load import load_checkpoint
from openvision.weights.open_clip import CONFIG_FILE, config_to_open_clip, to_open_clip

CONFIG = OpenVisionConfig(
    embed_dim=32,
    vision=VisionConfig(width=64, depth=2, mlp_dim=128, heads=2, patch_size=8, image_size=32),
    text=TextConfig(width=48, depth=2, mlp_dim=96, heads=2, vocab_size=400, context_length=24),
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same random weights here and in open_clip, spread widely enough that answers differ."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    ours = OpenVision(CONFIG).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    save_file(to_open_clip(ours.state_dict(), CONFIG), folder / "open_clip_model.safetensors")
    (folder / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(CONFIG)))
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    loaded = load_checkpoint(folder).model
    assert loaded is not None
    return loaded, theirs


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train([f"a photo of the {name}" for name in class_names("imagenet")[:200]], 400)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (240, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return blocks.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def test_templates_and_names_are_open_clips() -> None:
    assert class_names("imagenet") == list(open_clip.IMAGENET_CLASSNAMES)
    templates = protocol("open_clip").templates
    assert len(templates) == 80
    assert [t.format("x") for t in templates] == [t("x") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    original = protocol("openvision")
    assert len(original.templates) == 81
    assert original.prompts("great white shark")[-1] == "great white shark"
    texts = [text for name in class_names("imagenet") for text in original.prompts(name)]
    # No name holds a comma once it is canonical (spec section 7).
    assert len(texts) == 81_000
    assert not any(letter in text for text in texts[:2000] for letter in ".,'-_")


def test_accuracy_is_open_clips(both, words, pictures, monkeypatch) -> None:
    ours, theirs = both
    names = class_names("imagenet")[:60]
    labels = torch.randint(0, len(names), (len(pictures),), generator=torch.Generator().manual_seed(2))
    how = protocol("open_clip")

    def tokenize(texts):
        return torch.from_numpy(words.encode(list(texts), CONFIG.text.context_length))

    weights = open_clip.build_zero_shot_classifier(theirs, tokenize, names, open_clip.OPENAI_IMAGENET_TEMPLATES)
    loader = [(normalize(pictures[start : start + 64]), labels[start : start + 64]) for start in range(0, 240, 64)]
    arguments = SimpleNamespace(device="cpu", precision="fp32", batch_size=64)
    # Its float(array of one) is an error with newer numpy; the same number otherwise.
    monkeypatch.setattr(open_clip_zero_shot, "float", lambda array: array.item(), raising=False)
    expected = open_clip_zero_shot.run(theirs, weights, loader, arguments)

    classes = classifier(text_encoder(ours, words), names, how)
    assert np.allclose(classes, weights.T.numpy(), atol=1e-5)
    ranks, predicted = answers(encode_images(ours, pictures), classes, labels.numpy())
    found = summarize(ranks, labels.numpy(), np.arange(len(labels)))
    assert len(np.unique(predicted)) > 10
    assert (found.values["top1"], found.values["top5"]) == expected
    assert 0 < expected[0] < expected[1] < 1


def test_one_caption_a_picture_is_open_clips_retrieval(both, words, pictures) -> None:
    ours, theirs = both
    texts = [f"a photo of the {name}" for name in class_names("imagenet")[:240]]
    images, captions = encode_images(ours, pictures), text_encoder(ours, words)(texts)
    with torch.no_grad():
        features = theirs.encode_image(normalize(pictures), normalize=True)
        ids = torch.from_numpy(words.encode(texts, CONFIG.text.context_length))
        expected = get_clip_metrics(features, theirs.encode_text(ids, normalize=True), theirs.logit_scale.exp())
    found = retrieve(images, captions).values
    for k in (1, 5, 10):
        assert found[f"i2t_r{k}"] == expected[f"image_to_text_R@{k}"]
        assert found[f"t2i_r{k}"] == expected[f"text_to_image_R@{k}"]
    median = np.floor(np.median(retrieval_ranks(captions, images))) + 1
    assert median == expected["text_to_image_median_rank"]


def test_several_captions_are_clip_benchmarks_recall(both, words, pictures) -> None:
    ours, theirs = both
    generator = np.random.default_rng(3)
    counts = generator.integers(1, 6, len(pictures))
    # Every text once: who wins among equal texts is for each library to say.
    drawn = iter(generator.permutation(class_names("imagenet")).tolist())
    texts = [[next(drawn) for _ in range(count)] for count in counts]

    def tokenize(batch):
        return torch.from_numpy(words.encode(list(batch), CONFIG.text.context_length))

    loader = [(normalize(pictures[start : start + 48]), texts[start : start + 48]) for start in range(0, 240, 48)]
    expected = zeroshot_retrieval.evaluate(theirs, loader, tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    owner = np.repeat(np.arange(len(pictures)), counts)
    flat = [text for own in texts for text in own]
    vectors = encode_images(ours, pictures), text_encoder(ours, words)(flat)
    found = retrieve(*vectors, np.arange(len(pictures)), owner).values
    for k in (1, 5, 10):
        assert found[f"t2i_r{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"], abs=1e-7)
        assert found[f"i2t_r{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"], abs=1e-7)

"""The same on trained weights: those of `openvision quickstart --source openmoji`, on its validation split."""

# pyright: reportMissingImports=false

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from open_clip_train import zero_shot as open_clip_zero_shot
from open_clip_train.train import get_clip_metrics
from safetensors.torch import save_file

from openvision.data.shards.dataset import ShardDataset
from openvision.encoding import encode_images, text_encoder
from openvision.evaluation.data.prompts import classifier, protocol
from openvision.evaluation.evaluators.retrieval import retrieve
from openvision.evaluation.evaluators.zero_shot import answers, summarize
from openvision.images.preprocess import decode_image, prepare, to_batch
from openvision.models.vision import normalize
from openvision.text.captions import sentences
from openvision.weights.load import load_checkpoint
from openvision.weights.open_clip import CONFIG_FILE, config_to_open_clip, to_open_clip

RUNS = Path(__file__).parents[2] / "runs"
MODEL = RUNS / "quickstart_openmoji/model"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_dir(), reason="run `openvision quickstart --source openmoji` first"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint, the same weights in open_clip, and the split."""
    folder = tmp_path_factory.mktemp("weights")
    checkpoint = load_checkpoint(MODEL)
    model = checkpoint.model
    assert model is not None
    # open_clip has no caption decoder.
    towers = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("decoder.")}
    save_file(to_open_clip(towers, model.config), folder / "open_clip_model.safetensors")
    (folder / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(model.config)))
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    samples = list(ShardDataset(RUNS / "openmoji/validation"))
    split = SimpleNamespace(
        images=to_batch([prepare(decode_image(sample.image), model.config.vision.image_size) for sample in samples]),
        names=[sample.meta["name"] for sample in samples],
        captions=[str(sample.synthetic) for sample in samples],
    )
    return checkpoint, theirs, split


def tokenize_by(checkpoint):
    length = checkpoint.model.config.text.context_length
    return lambda texts: torch.from_numpy(checkpoint.tokenizer.encode(list(texts), length))


def test_accuracy_is_open_clips(trained, monkeypatch) -> None:
    checkpoint, theirs, split = trained
    names = sorted(set(split.names))
    labels = torch.tensor([names.index(name) for name in split.names])
    weights = open_clip.build_zero_shot_classifier(
        theirs, tokenize_by(checkpoint), names, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    loader = [(normalize(split.images[i : i + 64]), labels[i : i + 64]) for i in range(0, len(labels), 64)]
    monkeypatch.setattr(open_clip_zero_shot, "float", lambda array: array.item(), raising=False)
    expected = open_clip_zero_shot.run(
        theirs, weights, loader, SimpleNamespace(device="cpu", precision="fp32", batch_size=64)
    )
    classes = classifier(text_encoder(checkpoint.model, checkpoint.tokenizer), names, protocol("open_clip"))
    ranks, _ = answers(encode_images(checkpoint.model, split.images), classes, labels.numpy())
    found = summarize(ranks, labels.numpy(), np.arange(len(labels)))
    assert (found.values["top1"], found.values["top5"]) == expected
    assert expected[0] > 0.1


def test_retrieval_is_open_clips_and_clip_benchmarks(trained) -> None:
    checkpoint, theirs, split = trained
    tokenize = tokenize_by(checkpoint)
    encode = text_encoder(checkpoint.model, checkpoint.tokenizer)
    images = encode_images(checkpoint.model, split.images)
    with torch.no_grad():
        features = theirs.encode_image(normalize(split.images), normalize=True)
        texts = theirs.encode_text(tokenize(split.names), normalize=True)
        expected = get_clip_metrics(features, texts, theirs.logit_scale.exp())
    found = retrieve(images, encode(split.names)).values
    for k in (1, 5, 10):
        assert found[f"i2t_r{k}"] == expected[f"image_to_text_R@{k}"]
        assert found[f"t2i_r{k}"] == expected[f"text_to_image_R@{k}"]
    # Every text once: who wins among equal texts is for each library to say.
    seen: set[str] = set()
    captions = []
    for name, caption in zip(split.names, split.captions, strict=True):
        own = [text for text in dict.fromkeys([name, *sentences(caption)]) if text not in seen]
        seen |= set(own)
        captions.append(own)
    loader = [(normalize(split.images[i : i + 48]), captions[i : i + 48]) for i in range(0, len(captions), 48)]
    several = zeroshot_retrieval.evaluate(theirs, loader, tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    owner = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    texts = encode([text for own in captions for text in own])
    found = retrieve(images, texts, np.arange(len(captions)), owner).values
    for k in (1, 5, 10):
        assert found[f"t2i_r{k}"] == pytest.approx(several[f"image_retrieval_recall@{k}"], abs=1e-7)
        assert found[f"i2t_r{k}"] == pytest.approx(several[f"text_retrieval_recall@{k}"], abs=1e-7)

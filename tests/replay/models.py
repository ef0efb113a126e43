"""Tiny models with a vocabulary, for the replays about texts, exports and loading."""

import torch

from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.text.tokenizer import Tokenizer
from openvision.weights.load import Checkpoint

SHAPE = OpenVisionConfig(
    embed_dim=24,
    vision=VisionConfig(width=48, depth=2, mlp_dim=96, heads=3, patch_size=8, image_size=40),
    text=TextConfig(width=32, depth=2, mlp_dim=64, heads=2, vocab_size=160, context_length=12),
)
TEXTS = ["a photo of a cat", "two dogs, it's 3 o'clock", "café fish & chips", "EUR 1 4 9 11"]


def stirred(model: OpenVision) -> OpenVision:
    """Random biases and norms too: what is zero or one at the start would hide a lost tensor."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def checkpoint() -> Checkpoint:
    """A contrastive model with the vocabulary of `TEXTS`."""
    torch.manual_seed(0)
    model = stirred(OpenVision(SHAPE))
    return Checkpoint(model.vision, model, Tokenizer.train(TEXTS, SHAPE.text.vocab_size), "test", {})

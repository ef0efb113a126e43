"""The decoder's split attention equals attention with a mask over the whole (prefix + queries) square."""

import torch
import torch.nn.functional as F
from torch import Tensor

import openvision.models.decoders.parallel
from openvision.models.decoders.parallel import DecoderBlock, DecoderConfig, ParallelCaptionDecoder
from openvision.models.kernels.dispatch import attention

CONFIG = DecoderConfig(width=32, depth=3, mlp_dim=64, heads=4, vocab_size=50, caption_length=7)


def masked_reference(decoder: ParallelCaptionDecoder, image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """The same decoder in the textbook form: one sequence, one square boolean mask, every row in every block."""
    prefix = torch.cat([decoder.image_proj(image_tokens), decoder.text_proj(text_tokens)], dim=1)
    x = torch.cat([prefix, decoder.queries.expand(len(prefix), -1, -1)], dim=1)
    length, split = x.shape[1], prefix.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[:split, :split] = True
    for block in decoder.blocks:
        assert isinstance(block, DecoderBlock)
        q, k, v = block.attn.split_heads(block.attn.qkv(block.norm1(x)), 3)
        x = x + block.attn.project(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))
        x = x + block.mlp(block.norm2(x))
    return decoder.norm(x[:, split:])


def run(function, decoder, image_tokens, text_tokens) -> tuple[Tensor, dict[str, Tensor]]:
    decoder.zero_grad()
    inputs = [image_tokens.clone().requires_grad_(), text_tokens.clone().requires_grad_()]
    states = function(*inputs)
    (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    return states.detach(), gradients | {"image": inputs[0].grad, "text": inputs[1].grad}


def test_split_attention_equals_masked_form_forward_and_backward():
    decoder = ParallelCaptionDecoder(CONFIG, image_width=24, text_width=16)
    image_tokens, text_tokens = torch.randn(2, 9, 24), torch.randn(2, 5, 16)
    states, gradients = run(decoder, decoder, image_tokens, text_tokens)
    expected_states, expected = run(
        lambda *tokens: masked_reference(decoder, *tokens), decoder, image_tokens, text_tokens
    )
    torch.testing.assert_close(states, expected_states, rtol=0, atol=2e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert (gradients[name] - gradient).abs().max().item() <= max(1e-5 * scale, 1e-5), name


def test_a_query_sees_no_later_query_and_the_prefix_sees_none():
    decoder = ParallelCaptionDecoder(CONFIG, image_width=24, text_width=16)
    image_tokens, text_tokens = torch.randn(1, 9, 24), torch.randn(1, 5, 16)
    before = decoder(image_tokens, text_tokens)
    with torch.no_grad():
        # Not a constant: LayerNorm would take it away.
        decoder.queries[4] += torch.randn(CONFIG.width)
    after = decoder(image_tokens, text_tokens)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_no_square_is_formed(monkeypatch):
    decoder = ParallelCaptionDecoder(CONFIG, image_width=24, text_width=16)
    shapes = []

    def spy(q, k, v, causal=False, seen=None):
        shapes.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, causal, seen)

    monkeypatch.setattr(openvision.models.decoders.parallel, "attention", spy)
    decoder(torch.randn(1, 9, 24), torch.randn(1, 5, 16))
    prefix, queries = 14, 7
    assert set(shapes) == {(prefix, prefix), (queries, prefix + queries)}
    # Three blocks, the last one without the prefix.
    assert len(shapes) == 5

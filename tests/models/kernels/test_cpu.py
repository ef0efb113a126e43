"""The CPU's own attention and linear map compute what the stock operations do, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openvision.models.decoders.lengths import states_by_length
from openvision.models.decoders.parallel import DecoderConfig, ParallelCaptionDecoder
from openvision.models.kernels import cpu as cpu_kernels
from openvision.models.kernels import dispatch
from openvision.models.kernels.cpu import attention as head_attention
from openvision.models.kernels.cpu import self_attention
from openvision.models.kernels.dispatch import linear
from openvision.models.layers import Attention, Block
from openvision.models.text import TextConfig, TextTransformer


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn(output.shape, dtype=output.dtype), retain_graph=True)


def stock_attention(qkv: Tensor, heads: int) -> Tensor:
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width // 3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 4e-2)]
)
def test_self_attention(dtype, tolerance):
    qkv = torch.randn(3, 11, 3 * 36, dtype=dtype, requires_grad=True)
    ours, stock = self_attention(qkv, 3), stock_attention(qkv, 3)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, stock, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradients(ours, qkv), gradients(stock, qkv), rtol=0, atol=tolerance)


def test_gradcheck_of_attention():
    qkv = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: self_attention(x, 2), qkv)


def test_linear_by_onednn():
    x = torch.randn(4, 7, 24, requires_grad=True)
    weight, bias = torch.randn(40, 24, requires_grad=True), torch.randn(40, requires_grad=True)
    ours, stock = linear(x, weight, bias), F.linear(x, weight, bias)
    assert "_Linear" in type(ours.grad_fn).__name__
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradients(ours, x, weight, bias), gradients(stock, x, weight, bias), rtol=1e-5, atol=1e-5
    )


def test_linear_takes_the_stock_operation_elsewhere():
    weight, bias = torch.randn(40, 24, requires_grad=True), torch.randn(40, requires_grad=True)
    x = torch.randn(4, 24)
    assert "_Linear" not in type(linear(x, weight, bias).grad_fn).__name__
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x.requires_grad_(), weight, bias).dtype == torch.bfloat16
    double = linear(x.double(), weight.double(), bias.double())
    assert double.dtype == torch.float64


def test_a_block_in_training_equals_the_stock_block(monkeypatch):
    torch.manual_seed(0)
    block = Block(32, 4, 64, gelu="tanh")
    x = torch.randn(3, 9, 32, requires_grad=True)
    parameters = list(block.parameters())
    ours = block(x)
    ours_gradients = gradients(ours, x, *parameters)
    monkeypatch.setattr(cpu_kernels, "HAS_ONEDNN_LINEAR", False)
    monkeypatch.setattr(dispatch, "training_on_cpu", lambda x: False)
    stock = block(x)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_gradients, gradients(stock, x, *parameters), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_of_heads_in_chunks(dtype, tolerance, masked, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "CHUNK_SCORES", 2 * 5 * 9)
    q, k, v = (torch.randn(2, n, 3, 4, dtype=dtype).transpose(1, 2).requires_grad_() for n in (5, 9, 9))
    mask = torch.arange(9) <= torch.arange(5)[:, None] + 4 if masked else None
    ours, stock = head_attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, stock, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradients(ours, q, k, v), gradients(stock, q, k, v), rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [6, cpu_kernels.KEPT_KEYS + 1])
def test_probabilities_kept_and_recomputed_give_the_same_gradient(length):
    qkv = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    ours, stock = self_attention(qkv, 2), stock_attention(qkv, 2)
    torch.testing.assert_close(gradients(ours, qkv), gradients(stock, qkv), rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_a_block_that_recomputes_its_mlp_is_the_block(precision, gelu):
    torch.manual_seed(0)
    block, x = Block(32, 4, 64, gelu), torch.randn(3, 9, 32, requires_grad=True)
    results = []
    for recompute in (False, True):
        block.recompute_mlp = recompute
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            output = block(x.bfloat16() if precision == "bfloat16" else x)
        results.append((output, *gradients(output, x, *block.parameters())))
    for plain, recomputed in zip(*results, strict=True):
        assert plain.dtype == recomputed.dtype
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


def test_long_sequences_take_the_fused_kernel_in_float32():
    attention = Attention(8, 2)
    short = attention(torch.randn(1, 16, 8))
    long = attention(torch.randn(1, dispatch.EXPLICIT_KEYS_ON_CPU + 1, 8))
    names = []
    for output in (short, long):
        nodes, seen = [output.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [parent for parent, _ in node.next_functions]
        names.append({type(node).__name__ for node in seen})
    assert any("SelfAttention" in name for name in names[0])
    assert not any("SelfAttention" in name for name in names[1])


def test_text_tower_computes_what_is_read_and_nothing_changes():
    torch.manual_seed(0)
    tower = TextTransformer(TextConfig(32, 3, 64, 4, vocab_size=50, context_length=8), 16).double()
    ids = torch.randint(0, 50, (6, 8))
    whole = tower.forward_features(ids)
    some = tower.forward_features(ids, token_rows=2)
    none = tower.forward_features(ids, token_rows=0)
    assert none.tokens.shape == (0, 7, 32)
    torch.testing.assert_close(some.tokens, whole.tokens[:2], rtol=1e-12, atol=1e-12)
    for features in (some, none):
        torch.testing.assert_close(features.pooled, whole.pooled, rtol=1e-12, atol=1e-12)
    parameters = [p for name, p in tower.named_parameters() if name != "head.weight"]
    for features in (some, none):
        torch.testing.assert_close(
            gradients(features.pooled, *parameters), gradients(whole.pooled, *parameters), rtol=1e-9, atol=1e-12
        )


def test_captions_are_computed_as_far_as_they_go_and_nothing_changes():
    torch.manual_seed(0)
    decoder = ParallelCaptionDecoder(DecoderConfig(16, 2, 32, 2, vocab_size=30, caption_length=12), 8, 8).double()
    images, texts = torch.randn(17, 5, 8).double(), torch.randn(17, 3, 8).double()
    lengths = torch.tensor([0, 12, 3, 1, 7, 7, 12, 2, 5, 0, 9, 4, 4, 3, 11, 6, 1])
    read = (torch.arange(12) < lengths[:, None])[..., None]
    whole, trimmed = decoder(images, texts) * read, decoder(images, texts, lengths) * read
    torch.testing.assert_close(trimmed, whole, rtol=1e-10, atol=1e-10)
    parameters = [p for name, p in decoder.named_parameters() if name != "head.weight"]
    torch.testing.assert_close(gradients(trimmed, *parameters), gradients(whole, *parameters), rtol=1e-9, atol=1e-10)


def test_groups_of_captions_reach_as_far_as_their_longest():
    asked: list[tuple[list[int], int]] = []

    def states_of(rows: Tensor | slice, reach: int) -> Tensor:
        assert isinstance(rows, Tensor)
        asked.append((sorted(rows.tolist()), reach))
        return rows[:, None, None].expand(-1, reach, 1) + torch.zeros(1)

    lengths = torch.tensor([9, 1, 0, 4, 8, 2, 3, 9])
    states = states_by_length(lengths, 10, states_of, lengths.device)
    assert asked == [([1, 2, 5, 6], 3), ([0, 3, 4, 7], 9)]
    assert states[:, 0, 0].tolist() == list(range(8))
    assert states.shape == (8, 10, 1)

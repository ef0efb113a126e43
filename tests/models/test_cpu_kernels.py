"""The CPU's own attention and linear map compute what the stock operations do, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openvision.models import cpu_kernels, layers
from openvision.models.cpu_kernels import linear, packed_attention
from openvision.models.layers import Attention, Block
from openvision.models.text import TextConfig, TextTransformer


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output), retain_graph=True)


def stock_attention(qkv: Tensor, heads: int) -> Tensor:
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width // 3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 4e-2)]
)
def test_packed_attention(dtype, tolerance):
    qkv = torch.randn(3, 11, 3 * 36, dtype=dtype, requires_grad=True)
    ours, stock = packed_attention(qkv, 3), stock_attention(qkv, 3)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, stock, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradients(ours, qkv), gradients(stock, qkv), rtol=0, atol=tolerance)


def test_gradcheck_of_attention():
    qkv = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packed_attention(x, 2), qkv)


def test_linear_by_onednn():
    x = torch.randn(4, 7, 24, requires_grad=True)
    weight, bias = torch.randn(40, 24, requires_grad=True), torch.randn(40, requires_grad=True)
    ours, stock = linear(x, weight, bias), F.linear(x, weight, bias)
    assert "OneDnn" in type(ours.grad_fn).__name__
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradients(ours, x, weight, bias), gradients(stock, x, weight, bias), rtol=1e-5, atol=1e-5
    )


def test_linear_takes_the_stock_operation_elsewhere():
    weight, bias = torch.randn(40, 24, requires_grad=True), torch.randn(40, requires_grad=True)
    x = torch.randn(4, 24)
    assert "OneDnn" not in type(linear(x, weight, bias).grad_fn).__name__
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
    monkeypatch.setattr(cpu_kernels, "_HAS_ONEDNN_LINEAR", False)
    monkeypatch.setattr(layers, "eager_training_on_cpu", lambda x: False)
    stock = block(x)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_gradients, gradients(stock, x, *parameters), rtol=1e-4, atol=1e-5)


def test_long_sequences_take_the_fused_kernel():
    attention = Attention(8, 2)
    short = attention(torch.randn(1, 16, 8))
    long = attention(torch.randn(1, layers.EXPLICIT_KEYS_ON_CPU + 1, 8))
    names = []
    for output in (short, long):
        nodes, seen = [output.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [parent for parent, _ in node.next_functions]
        names.append({type(node).__name__ for node in seen})
    assert any("PackedAttention" in name for name in names[0])
    assert not any("PackedAttention" in name for name in names[1])


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

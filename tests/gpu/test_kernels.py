"""Kernels for CUDA against the same computation in float64: attention with its gradients, the optimizer's update.

With a second CUDA device kernels and copies run there too, while the first is the current one.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openvision.models.kernels import dispatch, gpu
from openvision.runtime import HostCopy, send
from openvision.training.checkpoint.tensors import Stager
from openvision.training.optimizer.adam import Adam

# Samples, heads, queries, keys, width of a head: full blocks, one token more, long and short remainders.
SELF = [
    (2, 3, 80, 64),
    (2, 2, 257, 64),
    (1, 2, 730, 64),
    (3, 2, 37, 32),
    (2, 2, 64, 128),
    (2, 2, 197, 64),
    (1, 2, 1, 64),
]
CROSS = [(2, 3, 128, 463, 64), (2, 2, 100, 211, 64), (2, 2, 128, 128, 64), (1, 2, 60, 257, 64), (2, 2, 37, 300, 128)]


def error(given: Tensor, wanted: Tensor) -> float:
    """Relative distance."""
    return ((given.double() - wanted).norm() / wanted.norm()).item()


@pytest.fixture(autouse=True)
def _kernels(cuda):
    if not gpu.HAS_TRITON:
        pytest.skip("Triton is not installed")


@pytest.mark.parametrize("shape", SELF)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_self_attention(shape, dtype, cuda):
    batch, heads, length, width = shape
    qkv = torch.randn(batch, length, 3 * heads * width, device=cuda, dtype=dtype).requires_grad_()
    assert gpu.takes(qkv, width)
    out = dispatch.self_attention(qkv, heads)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, qkv, grad)
    exact = qkv.detach().double().requires_grad_()
    q, k, v = dispatch.split_heads(exact, 3, heads)
    wanted = dispatch.merge_heads(F.scaled_dot_product_attention(q, k, v))
    (wanted_grad,) = torch.autograd.grad(wanted, exact, grad.double())
    assert error(out, wanted) < 5e-3
    for part, wanted_part in zip(found.chunk(3, dim=2), wanted_grad.chunk(3, dim=2), strict=True):
        # One key alone: the gradients of queries and keys are zero.
        assert length == 1 or error(part, wanted_part) < 5e-3
    assert found.isfinite().all()


@pytest.mark.parametrize("shape", CROSS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_queries_over_other_keys(shape, causal, cuda):
    batch, heads, queries, keys, width = shape
    q = torch.randn(batch, heads, queries, width, device=cuda, dtype=torch.bfloat16).requires_grad_()
    k, v = (torch.randn(batch, keys, heads, width, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    k, v = (x.transpose(1, 2).requires_grad_() for x in (k, v))
    out = dispatch.attention(q, k, v, causal)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = dispatch.causal_mask(queries, keys, cuda) if causal else None
    wanted = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double())
    assert error(out, wanted) < 5e-3
    assert all(error(one, other) < 5e-3 for one, other in zip(found, wanted_grads, strict=True))


def test_compiled_code_may_take_them(monkeypatch, cuda):
    monkeypatch.setattr(gpu, "IN_COMPILED_CODE", True)

    def attend(x: Tensor) -> Tensor:
        return dispatch.self_attention(x * 2, 3) * 0.5

    x = torch.randn(4, 257, 3 * 3 * 64, device=cuda, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(4, 257, 3 * 64, device=cuda, dtype=torch.bfloat16)
    eager, compiled = attend(x), torch.compile(attend, fullgraph=True)(x)
    torch.testing.assert_close(eager, compiled, rtol=2e-2, atol=2e-2)
    (one,), (other,) = torch.autograd.grad(eager, x, grad), torch.autograd.grad(compiled, x, grad)
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_large_negative_scores_stay_finite(cuda):
    qkv = torch.full((1, 70, 3 * 64), 20.0, device=cuda, dtype=torch.bfloat16)
    qkv[:, :, 64:128] = -20.0
    qkv.requires_grad_()
    out = dispatch.self_attention(qkv, 1)
    (found,) = torch.autograd.grad(out.sum(), qkv)
    assert out.isfinite().all()
    assert found.isfinite().all()


@pytest.mark.parametrize("moment", [torch.bfloat16, torch.float32])
def test_the_update_is_that_of_the_list_operations(moment, cuda):
    """Five updates, the third of them not selected; then none of it enters parameters or moments."""
    torch.manual_seed(0)
    shapes = [(3, 5), (5000,), (64, 77), ()]
    start = [torch.randn(shape, device=cuda) for shape in shapes]
    kept: list[list[Tensor]] = []
    for kernel in (True, False):
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = Adam([{"params": parameters, "weight_decay": 0.1}], first_moment=moment)
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.measure = True
        generator = torch.Generator(cuda).manual_seed(1)
        for step in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, device=cuda, generator=generator)
                if step == 2:
                    parameter.grad.fill_(math.nan)
            if kernel:
                optimizer.step(selected=torch.tensor(step != 2, device=cuda))
            elif step != 2:
                optimizer.step()
        assert optimizer.update_norm is not None
        state = [optimizer.state[parameter] for parameter in parameters]
        kept.append(
            [*parameters, *(s["exp_avg"] for s in state), *(s["exp_avg_sq"] for s in state), optimizer.update_norm]
        )
    for one, other in zip(*kept, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def second(cuda) -> torch.device:
    """A CUDA device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.cuda.set_device(0)
    return torch.device("cuda:1")


def test_attention_on_a_device_that_is_not_current(second):
    qkv = torch.randn(2, 80, 3 * 128, device=second, dtype=torch.bfloat16).requires_grad_()
    out = dispatch.self_attention(qkv, 2)
    out.sum().backward()
    wanted = dispatch.self_attention(qkv.detach().cpu().float(), 2)
    assert error(out.cpu(), wanted.double()) < 5e-3
    assert qkv.grad is not None
    assert qkv.grad.isfinite().all()
    assert torch.cuda.current_device() == 0


def test_the_update_on_a_device_that_is_not_current(second):
    parameters = [torch.nn.Parameter(torch.ones(5000, device=where)) for where in (second, "cpu")]
    for parameter in parameters:
        parameter.grad = torch.linspace(-1, 1, 5000, device=parameter.device)
        optimizer = Adam([{"params": [parameter], "weight_decay": 0.1, "lr": 0.1}])
        optimizer.step(selected=torch.tensor(True, device=parameter.device))
    torch.testing.assert_close(parameters[0].cpu(), parameters[1], rtol=1e-5, atol=1e-6)


def test_a_copy_from_a_device_that_is_not_current(second):
    """The host waits for that device, not for the current one."""
    x = torch.zeros(1, device=second)
    with torch.cuda.device(second):
        torch.cuda._sleep(200_000_000)
        x += 1
    assert HostCopy(x).values() == [1.0]
    assert send(x, second) is x


def test_a_checkpoint_of_a_device_that_is_not_current(second):
    """It is complete when it is written, though its device had work left."""
    x = torch.zeros(1000, device=second)
    with torch.cuda.device(second):
        torch.cuda._sleep(200_000_000)
        x += 1
    stager = Stager()
    assert stager.stage({"x": x})["x"].sum().item() == 1000
    stager.close()

"""The attention kernels read nothing beside their tensors: each ends before a page that may not be read.

Triton's interpreter runs the kernels on a CPU. Triton comes with PyTorch for CUDA; without it there is nothing to test.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Tokens of self-attention: remainders smaller and larger than half a block, none, one.
LENGTHS = (1, 17, 37, 53, 64, 65)
# Queries and keys, causal.
CROSS = ((24, 117), (100, 163), (63, 127), (128, 463))
PROGRAM = """
import ctypes, math, mmap, sys
import torch
from torch.nn.functional import scaled_dot_product_attention
from openvision.models.kernels import triton_attention as kernels

libc, held = ctypes.CDLL(None), []

def guarded(*shape):
    size = 2 * math.prod(shape)
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, end + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + end), mmap.PAGESIZE, 0) == 0
    held.append(memory)
    return torch.frombuffer(memory, dtype=torch.float16, count=size // 2, offset=end - size).view(shape).normal_()

def check(out, *inputs):
    torch.testing.assert_close(out.float(), scaled_dot_product_attention(*inputs), rtol=0, atol=5e-3)

def heads(length):
    return guarded(1, length, 2, 32).transpose(1, 2)

for length in LENGTHS:
    qkv = guarded(1, length, 192)
    out, sums = kernels.self_attention(qkv, 2)
    parts = [part.float().unflatten(2, (2, 32)).transpose(1, 2) for part in qkv.chunk(3, 2)]
    check(out.unflatten(2, (2, 32)).transpose(1, 2), *parts)
    assert kernels._self_attention_backward(guarded(1, length, 64), qkv, out, sums, 2).isfinite().all()
for queries, keys in CROSS:
    q, k, v = heads(queries), heads(keys), heads(keys)
    out, sums = kernels.attention(q, k, v, True)
    mask = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    check(out, q.float(), k.float(), v.float(), mask)
    gradients = kernels._attention_backward(heads(queries), q, k, v, out, sums, True)
    assert all(gradient.isfinite().all() for gradient in gradients)
print("read nothing beside them")
"""


@pytest.mark.skipif(find_spec("triton") is None or sys.platform != "linux", reason="needs Triton on Linux")
def test_kernels_read_nothing_beside_their_tensors():
    program = f"LENGTHS, CROSS = {LENGTHS}, {CROSS}\n{PROGRAM}"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"ended with {done.returncode}: memory beside a tensor was read"
    assert "read nothing beside them" in done.stdout

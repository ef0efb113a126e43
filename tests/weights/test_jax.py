"""Names of the original's parameter tree."""

from pathlib import Path

import numpy as np
import pytest

from openvision.errors import OpenVisionError
from openvision.weights.jax import from_jax, to_jax

BLOCK = "img/Transformer/encoderblock_0/MultiHeadDotProductAttention_0"


def test_dense_kernels_are_transposed_and_qkv_stacked():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(4, 4)).astype(np.float32) for _ in range(3))
    state = from_jax({f"{BLOCK}/query/kernel": q, f"{BLOCK}/value/kernel": v, f"{BLOCK}/key/kernel": k})
    assert np.array_equal(state["vision.blocks.0.attn.qkv.weight"].numpy(), np.concatenate([q.T, k.T, v.T]))


def test_patch_kernel_and_temperature():
    kernel = np.arange(2 * 2 * 3 * 5, dtype=np.float32).reshape(2, 2, 3, 5)
    state = from_jax({"img/embedding/kernel": kernel, "t": np.array([2.0], dtype=np.float32)})
    assert state["vision.patch_embed.proj.weight"][4, 1, 0, 1] == kernel[0, 1, 1, 4]
    assert state["logit_scale"].shape == ()


def test_unknown_and_incomplete_names():
    with pytest.raises(OpenVisionError, match="img/unknown is no parameter"):
        from_jax({"img/unknown": np.zeros(1)})
    with pytest.raises(OpenVisionError, match="query, key or value is missing"):
        from_jax({f"{BLOCK}/query/kernel": np.zeros((2, 2), dtype=np.float32)})


def test_the_golden_tree_there_and_back():
    with np.load(Path(__file__).parents[1] / "golden" / "openvision_tiny.npz") as archive:
        tree = {name.removeprefix("param:"): archive[name] for name in archive.files if name.startswith("param:")}
    back = to_jax(from_jax(tree))
    assert back.keys() == tree.keys()
    assert all(np.array_equal(back[name], tree[name]) for name in tree)

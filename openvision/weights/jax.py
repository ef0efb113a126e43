"""Names and layouts of the original's JAX parameter tree, turned into ours (spec section 8).

A JAX tree is given flat: `img/Transformer/encoderblock_0/LayerNorm_0/scale` -> array. Dense kernels are (in, out)
and become (out, in); query, key and value are stacked into one `qkv`; the patch kernel (p, p, 3, D) becomes
(D, 3, p, p). Gradients convert the same way, since every step is linear and one-to-one.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_TOWERS = {"img": "vision", "txt": "text", "txt_decoder": "decoder"}
_BLOCK = re.compile(r"^Transformer/encoderblock_(\d+)/(.+)$")
_ATTENTION = "MultiHeadDotProductAttention_0"
_IN_BLOCK = {
    "LayerNorm_0/scale": "norm1.weight",
    "LayerNorm_0/bias": "norm1.bias",
    "LayerNorm_1/scale": "norm2.weight",
    "LayerNorm_1/bias": "norm2.bias",
    f"{_ATTENTION}/out/kernel": "attn.proj.weight",
    f"{_ATTENTION}/out/bias": "attn.proj.bias",
    "MlpBlock_0/Dense_0/kernel": "mlp.fc1.weight",
    "MlpBlock_0/Dense_0/bias": "mlp.fc1.bias",
    "MlpBlock_0/Dense_1/kernel": "mlp.fc2.weight",
    "MlpBlock_0/Dense_1/bias": "mlp.fc2.bias",
}
_OUTSIDE_BLOCKS = {
    "img/cls": "vision.cls_token",
    "img/embedding/kernel": "vision.patch_embed.proj.weight",
    "img/encoder_norm/scale": "vision.fc_norm.weight",
    "img/encoder_norm/bias": "vision.fc_norm.bias",
    "img/head/kernel": "vision.head.weight",
    "txt/Embed_0/embedding": "text.token_embed.weight",
    "txt/pos_embedding": "text.pos_embed",
    "txt/encoder_norm/scale": "text.norm.weight",
    "txt/encoder_norm/bias": "text.norm.bias",
    "txt/head/kernel": "text.head.weight",
    "txt_decoder/learnable_tokens": "decoder.queries",
    "txt_decoder/image_projection_layer/kernel": "decoder.image_proj.weight",
    "txt_decoder/text_projection_layer/kernel": "decoder.text_proj.weight",
    "txt_decoder/decoder_norm/scale": "decoder.norm.weight",
    "txt_decoder/decoder_norm/bias": "decoder.norm.bias",
    "txt_decoder/head/kernel": "decoder.head.weight",
    "t": "logit_scale",
}
_QKV = {f"{_ATTENTION}/{part}": index for index, part in enumerate(("query", "key", "value"))}


def from_jax(tree: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert a flat JAX tree into a state dict of `OpenVision`; raises KeyError on a name it does not know."""
    state: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor | None]] = {}
    for name, array in tree.items():
        tower, _, rest = name.partition("/")
        block = _BLOCK.match(rest)
        if not block:
            state[_OUTSIDE_BLOCKS[name]] = _to_torch(name, array)
            continue
        prefix, part = f"{_TOWERS[tower]}.blocks.{block[1]}", block[2]
        if part in _IN_BLOCK:
            state[f"{prefix}.{_IN_BLOCK[part]}"] = _to_torch(name, array)
            continue
        projection, _, leaf = part.rpartition("/")
        target = f"{prefix}.attn.qkv.{'weight' if leaf == 'kernel' else 'bias'}"
        stacks.setdefault(target, [None, None, None])[_QKV[projection]] = _to_torch(name, array)
    for target, parts in stacks.items():
        if any(part is None for part in parts):
            raise KeyError(f"{target}: query, key or value is missing")
        state[target] = torch.cat([part for part in parts if part is not None])
    return state


def _to_torch(name: str, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    if name == "t":
        return tensor.reshape(())
    if name == "img/embedding/kernel":
        return tensor.permute(3, 2, 0, 1).contiguous()
    if name.endswith("/kernel"):
        return tensor.T.contiguous()
    return tensor

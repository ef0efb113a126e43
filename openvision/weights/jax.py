"""Convert the original's JAX parameter tree to this project's names and layouts (spec section 8).

A JAX tree is flat here: `img/Transformer/encoderblock_0/LayerNorm_0/scale` -> array. Dense kernels are (in, out)
and become (out, in); query, key and value are stacked into one `qkv`; the patch kernel (p, p, 3, D) becomes
(D, 3, p, p). Trees saved with one axis a head (D, heads, d) are flattened first. Gradients convert in
the same way, because every step is linear and one-to-one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from openvision.errors import OpenVisionError, require
from openvision.models.decoders.parallel import DecoderConfig
from openvision.models.openvision import OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.variants import Sizes, known_heads
from openvision.models.vision import VisionConfig

T = TypeVar("T")

_TOWERS = {"img": "vision", "txt": "text", "txt_decoder": "decoder"}
_BLOCK = re.compile(r"^Transformer/encoderblock_(\d+)/(.+)$")
_OUR_BLOCK = re.compile(r"^(vision|text|decoder)\.blocks\.(\d+)\.(.+)$")
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
# What lies in a folder that holds a tree itself, whichever version of Orbax wrote it.
_TREE_SIGNS = ("_METADATA", "manifest.ocdbt", "_sharding", "checkpoint")
# Folders that hold nothing but the tree: the release's, its root, and CheckpointManager's name for a single item.
ORBAX_FOLDER = "jax_orbax_weight"
_ORBAX_LEVELS = (ORBAX_FOLDER, "checkpoint.npz", "default")
_STEP = re.compile(r"(?:.*_)?([0-9]{1,18})")
_QKV = {f"{_ATTENTION}/{part}": index for index, part in enumerate(("query", "key", "value"))}


def from_jax(tree: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert a flat JAX tree into a state dict of `OpenVision`; raises OpenVisionError on a name it does not know."""
    return consume_jax(dict(tree))


def consume_jax(tree: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """`from_jax` that empties `tree` on the way, so that no more than one array is in memory twice."""
    state: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor | None]] = {}
    for name in list(tree):
        array = tree.pop(name)
        tower, _, rest = name.partition("/")
        block = _BLOCK.match(rest)
        if not block:
            state[_known(_OUTSIDE_BLOCKS, name, name)] = _to_torch(name, array)
            continue
        array = _without_head_axis(part := block[2], array)
        prefix = f"{_TOWERS[tower]}.blocks.{block[1]}"
        if part in _IN_BLOCK:
            state[f"{prefix}.{_IN_BLOCK[part]}"] = _to_torch(name, array)
            continue
        projection, _, leaf = part.rpartition("/")
        target = f"{prefix}.attn.qkv.{'weight' if leaf == 'kernel' else 'bias'}"
        place = _known(_QKV, projection, name)
        stacks.setdefault(target, [None, None, None])[place] = _to_torch(name, array)
    for target in list(stacks):
        parts = stacks.pop(target)
        if any(part is None for part in parts):
            raise OpenVisionError(f"{target}: query, key or value is missing from the JAX tree")
        state[target] = torch.cat([part for part in parts if part is not None])
    return state


def _known(table: Mapping[str, T], key: str, name: str) -> T:
    if key not in table:
        raise OpenVisionError(f"{name} is no parameter of OpenVision's JAX tree")
    return table[key]


def _to_torch(name: str, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    if name == "t":
        return tensor.reshape(())
    if name == "img/embedding/kernel":
        return tensor.permute(3, 2, 0, 1).contiguous()
    if name.endswith("/kernel"):
        return tensor.T.contiguous()
    return tensor


def to_jax(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Inverse of `from_jax`: a state dict of `OpenVision` as the flat tree the original's code reads."""
    towers = {ours: theirs for theirs, ours in _TOWERS.items()}
    outside = {ours: theirs for theirs, ours in _OUTSIDE_BLOCKS.items()}
    inside = {ours: theirs for theirs, ours in _IN_BLOCK.items()}
    tree: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        block = _OUR_BLOCK.match(name)
        if not block:
            tree[outside[name]] = _to_numpy(outside[name], tensor)
            continue
        prefix, part = f"{towers[block[1]]}/Transformer/encoderblock_{block[2]}", block[3]
        if part in inside:
            tree[f"{prefix}/{inside[part]}"] = _to_numpy(inside[part], tensor)
            continue
        leaf = "kernel" if part.endswith("weight") else "bias"
        for projection, piece in zip(_QKV, tensor.chunk(3), strict=True):
            tree[f"{prefix}/{projection}/{leaf}"] = _to_numpy(leaf, piece)
    return tree


def _to_numpy(name: str, tensor: Tensor) -> np.ndarray:
    array = tensor.detach().float().cpu().numpy()
    if name == "t":
        return array.reshape(1)
    if name == "img/embedding/kernel":
        return array.transpose(2, 3, 1, 0)
    return array.T if name.endswith("kernel") else array


def _without_head_axis(part: str, array: np.ndarray) -> np.ndarray:
    """Kernels (D, h, d) and (h, d, D) and biases (h, d) of a tree with a head axis, as plain matrices and vectors."""
    if not part.startswith(_ATTENTION):
        return array
    if part.endswith("out/kernel"):
        return array.reshape(-1, array.shape[-1])
    return array.reshape(len(array), -1) if part.endswith("/kernel") else array.reshape(-1)


def find_orbax(folder: Path) -> Path | None:
    """The folder in which Orbax stored a tree: `folder` itself, or below it; None when there is none.

    The original's CheckpointManager writes `checkpoint.npz/STEP/default/`, and the release keeps that below
    `jax_orbax_weight`. Of several steps the newest is taken; those that were not finished have other names.
    """
    if any((folder / sign).exists() for sign in _TREE_SIGNS):
        return folder
    for name in _ORBAX_LEVELS:
        if (folder / name).is_dir():
            return find_orbax(folder / name)
    steps = {int(found[1]): path for path in _subfolders(folder) if (found := _STEP.fullmatch(path.name))}
    return find_orbax(steps[max(steps)]) if steps else None


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError as error:
        raise OpenVisionError(f"{folder} cannot be listed: {error.strerror}") from error


def read_orbax(folder: Path) -> dict[str, np.ndarray]:
    """The flat parameters of an Orbax folder such as the released `jax_orbax_weight`; optimizer state is left out.

    Any folder that `find_orbax` finds the tree from will do. Needs the extra `orbax`. Raises OpenVisionError when there
    is no tree or it cannot be restored.
    """
    found = find_orbax(folder)
    if found is None:
        raise OpenVisionError(
            f"{folder} holds no Orbax checkpoint: neither it nor its newest step has any of {', '.join(_TREE_SIGNS)}; "
            "download the folder again"
        )
    folder = found
    checkpoint = require("orbax.checkpoint", extra="orbax")
    try:
        with checkpoint.PyTreeCheckpointer() as reader:
            shapes = reader.metadata(folder.resolve()).item_metadata.tree
            # The optimizer's moments are not read. Arrays are restored as numpy, because the devices that wrote them
            # are not here.
            wanted = {"params": shapes["params"]} if "params" in shapes else shapes
            as_numpy = _map(wanted, lambda _: checkpoint.RestoreArgs(restore_type=np.ndarray))
            tree = reader.restore(folder.resolve(), item=wanted, restore_args=as_numpy, transforms={})
    except Exception as error:  # Orbax raises whatever its storage raises.
        raise OpenVisionError(f"{folder} is not an Orbax checkpoint that can be restored: {error}") from error
    return {name: np.asarray(array) for name, array in _flatten(tree)}


def _map(tree: object, function: Callable[[object], object]) -> object:
    if isinstance(tree, Mapping):
        return {name: _map(branch, function) for name, branch in tree.items()}
    return function(tree)


def _flatten(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for name, branch in tree.items():
        yield from _flatten(branch, f"{prefix}/{name}" if prefix else str(name))


def parameters_of(tree: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters only: the branch `params` if there is one, with OpenVision 2's tower under the name of version 1's."""
    branch = {name.removeprefix("params/"): array for name, array in tree.items() if name.startswith("params/")}
    return {
        re.sub("^img_encoder/", "img/", name): array
        for name, array in (branch or tree).items()
        if not name.startswith("opt/")
    }


def is_openvision2(tree: Mapping[str, np.ndarray]) -> bool:
    """Whether a tree of parameters has no text tower."""
    return not any(name.startswith("txt/") for name in tree)


def infer_vision_config(tree: Mapping[str, np.ndarray], image_size: int, source: str) -> VisionConfig:
    """Shape of the vision tower; a JAX tree does not contain the resolution `image_size`, pixels."""
    patch = _shape(tree, "img/embedding/kernel", source)[0]
    return VisionConfig(**_tower(tree, "img", source), patch_size=patch, image_size=image_size)


def infer_config(tree: Mapping[str, np.ndarray], image_size: int, source: str) -> OpenVisionConfig:
    """Shape of a whole v1 model, with its decoder if the tree has one."""
    decoder = None
    if "txt_decoder/learnable_tokens" in tree:
        decoder = DecoderConfig(
            **_tower(tree, "txt_decoder", source),
            vocab_size=_shape(tree, "txt_decoder/head/kernel", source)[1],
            caption_length=_shape(tree, "txt_decoder/learnable_tokens", source)[0],
        )
    return OpenVisionConfig(
        embed_dim=_shape(tree, "img/head/kernel", source)[1],
        vision=infer_vision_config(tree, image_size, source),
        text=TextConfig(
            **_tower(tree, "txt", source),
            vocab_size=_shape(tree, "txt/Embed_0/embedding", source)[0],
            context_length=_shape(tree, "txt/pos_embedding", source)[1],
        ),
        decoder=decoder,
    )


def _tower(tree: Mapping[str, np.ndarray], tower: str, source: str) -> Sizes:
    """Width, depth, MLP width and heads; heads from the head axis, else from the table of sizes.

    Raises OpenVisionError when neither names them.
    """
    first = f"{tower}/Transformer/encoderblock_0"
    width, hidden = _shape(tree, f"{first}/MlpBlock_0/Dense_0/kernel", source)
    pattern = re.compile(rf"^{tower}/Transformer/encoderblock_(\d+)/")
    depth = 1 + max(int(found[1]) for name in tree if (found := pattern.match(name)))
    query = _shape(tree, f"{first}/{_ATTENTION}/query/kernel", source)
    heads = query[1] if len(query) == 3 else known_heads(width, depth)
    if heads is None:
        raise OpenVisionError(
            f"{source}: no released size has a tower of width {width} and depth {depth}, so nothing says how many "
            f"heads {tower} has; save the tree with one axis a head (use_dense_general)"
        )
    return {"width": width, "depth": depth, "mlp_dim": hidden, "heads": heads}


def _shape(tree: Mapping[str, np.ndarray], name: str, source: str) -> tuple[int, ...]:
    if name not in tree:
        raise OpenVisionError(f"{source} is not a parameter tree of OpenVision: {name} is missing")
    return tuple(tree[name].shape)

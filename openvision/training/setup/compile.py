"""Activation checkpointing and compilation of a model's blocks.

- A block gets a subclass of its own class whose ways in (the decoders' blocks have several) are wrapped, as FSDP2 does
  it with the modules it shards: names of parameters, outputs and gradients stay the same.
- "selective" keeps what is expensive to compute, the results of matrix products and of attention, and recomputes norms,
  GELUs and sums: most of the memory for a few per cent of the time. On a CPU, where watching every operation costs more
  than that, blocks have a function for it (`Block.recompute_mlp`).
- Compilation comes outside of recomputation, so that the compiler sees both.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from openvision.models.kernels import gpu
from openvision.models.layers import Block

Checkpointing = Literal["none", "selective", "full"]
Entry = Callable[..., object]
"""A way into a block: takes the block, tensors and flags."""
# Every way into a block, of whichever tower.
ENTRIES = ("forward", "forward_rows", "forward_prefix", "forward_queries")

_aten = torch.ops.aten
EXPENSIVE: set[object] = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}

if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    EXPENSIVE.add(torch.ops.mkldnn._linear_pointwise.default)


def prepare_blocks(model: nn.Module, checkpointing: Checkpointing = "none", compiled: bool = False) -> None:
    """Have every block of `model` recompute its activations in the backward pass, and compile it, as asked."""
    prepared: dict[type[Block], type[Block]] = {}
    for block in model.modules():
        if isinstance(block, Block):
            block.recompute_mlp = checkpointing == "selective"
            if checkpointing != "none" or compiled:
                kind = type(block)
                prepared[kind] = prepared.get(kind) or _prepared(kind, checkpointing, compiled)
                block.__class__ = prepared[kind]


def _prepared(kind: type[Block], checkpointing: Checkpointing, compiled: bool) -> type[Block]:
    """The subclass of a class of blocks whose entries are wrapped."""
    entries = {name: getattr(kind, name) for name in ENTRIES if hasattr(kind, name)}
    wrapped = {name: _wrapped(entry, checkpointing, compiled) for name, entry in entries.items()}
    return type(f"Prepared{kind.__name__}", (kind,), wrapped)


def _wrapped(entry: Entry, checkpointing: Checkpointing, compiled: bool) -> Entry:
    run = entry
    if checkpointing == "full":
        run = partial(checkpoint, entry, use_reentrant=False)
    elif checkpointing == "selective":
        contexts = partial(create_selective_checkpoint_contexts, partial(_keep, EXPENSIVE | gpu.operators()))
        run = partial(checkpoint, entry, use_reentrant=False, context_fn=contexts)
        run = run if compiled else _except_on_cpu(run, entry)
    if compiled:
        run = torch.compile(run)

    def enter(block: Block, *inputs: Tensor | bool | None) -> object:
        return run(block, *inputs)

    return enter


def _except_on_cpu(run: Entry, on_cpu: Entry) -> Entry:
    def chosen(block: Block, x: Tensor, *rest: Tensor | bool | None) -> object:
        return (on_cpu if x.device.type == "cpu" else run)(block, x, *rest)

    return chosen


def _keep(expensive: set[object], context: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in expensive else CheckpointPolicy.PREFER_RECOMPUTE

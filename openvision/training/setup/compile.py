"""How the blocks of a model are run: what is kept for the backward pass, and whether they are compiled.

- Blocks are wrapped one by one, method by method, since the decoders' have several ways in. Outputs and gradients stay
  the same: recomputation repeats the same operations.
- "selective" keeps what is expensive to make, the results of matrix products and of attention, and makes norms, GELUs
  and sums again: most of the memory for a few per cent of the time. On a CPU, where watching every operation costs more
  than that, blocks have a function for it (`Block.recompute_mlp`).
- Compilation comes outside of recomputation, so that the compiler sees both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from openvision.models.layers import Block

Checkpointing = Literal["none", "selective", "full"]
# Every way into a block, of whichever tower.
ENTRIES = ("forward", "forward_rows", "forward_prefix", "forward_queries")

_aten = torch.ops.aten
EXPENSIVE = {
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
    """Wrap the methods of every block of `model`, in place."""
    for block in model.modules():
        if isinstance(block, Block):
            block.recompute_mlp = checkpointing == "selective"
            for name in ENTRIES:
                method = getattr(block, name, None)
                if method is not None:
                    setattr(block, name, _wrapped(method, checkpointing, compiled))


def _wrapped(method: Callable[..., Any], checkpointing: Checkpointing, compiled: bool) -> Callable[..., Any]:
    if checkpointing == "full":
        method = partial(checkpoint, method, use_reentrant=False)
    elif checkpointing == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _keep_expensive)
        wrapped = partial(checkpoint, method, use_reentrant=False, context_fn=contexts)
        method = wrapped if compiled else _except_on_cpu(wrapped, method)
    return torch.compile(method) if compiled else method


def _except_on_cpu(method: Callable[..., Any], on_cpu: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(x: Tensor, *rest: Any) -> Any:
        return (on_cpu if x.device.type == "cpu" else method)(x, *rest)

    return chosen


def _keep_expensive(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE

# pyright: reportMissingImports=false, reportIndexIssue=false
"""The optimizer's update as one pass over memory on CUDA, in Triton; `Adam` in optimizer.py says what it computes.

List operations read and write every parameter and moment a dozen times, and a selected update copies them besides.
One kernel for all tensors reads each once and writes it once, or not at all when the update is not selected.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that one program of the kernel updates.
BLOCK = 4096
# Bytes at which all tensors must begin for the widest loads.
ALIGNMENT = 16


class Constants(NamedTuple):
    """What the parameters of a group have in common."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    learning_rate: float


def fused_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    count: Tensor,
    constants: Constants,
    selected: Tensor,
) -> Tensor:
    """Update parameters and both moments in place where `selected`, bool (), is true.

    All are flat and equally long in each place; `first` may be bfloat16, the others are float32. `count`, float32 (),
    is the number of this update. Returns the squared norm of the update, float32 ().
    """
    device = parameters[0].device
    sizes = tuple(len(parameter) for parameter in parameters)
    lists = (parameters, gradients, first, second)
    addresses = np.array([[tensor.data_ptr() for tensor in tensors] for tensors in lists], dtype=np.int64)
    aligned = not (addresses % ALIGNMENT).any()
    pointers = torch.from_numpy(addresses.T.copy()).pin_memory().to(device, non_blocking=True)
    blocks = _blocks(sizes, device)
    squares = torch.empty(len(blocks), device=device)
    corrections = torch.stack([1 - constants.beta1**count, 1 - constants.beta2**count])
    decay = torch.tensor(constants.beta1, dtype=first[0].dtype).item()
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(parameters[0]):
        _kernel[(len(blocks),)](
            pointers,
            blocks,
            corrections,
            selected,
            squares,
            decay,
            1 - constants.beta1,
            constants.beta2,
            1 - constants.beta2,
            constants.eps,
            constants.weight_decay,
            constants.learning_rate,
            ROUNDED=first[0].dtype == torch.bfloat16,
            ALIGNED=aligned,
            SIZE=BLOCK,
            num_warps=8,
        )
    return squares.sum()


@lru_cache(maxsize=8)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """For each program the tensor, the first element and the tensor's length, int64 (programs, 3)."""
    rows = []
    for tensor, size in enumerate(sizes):
        starts = np.arange(0, size, BLOCK)
        rows.append(np.stack([np.full_like(starts, tensor), starts, np.full_like(starts, size)], axis=1))
    return torch.from_numpy(np.concatenate(rows)).to(device)


@triton.jit
def _kernel(
    pointers,
    blocks,
    corrections,
    selected,
    squares,
    decay1,
    gain1,
    decay2,
    gain2,
    eps,
    weight_decay,
    learning_rate,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SIZE: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(blocks + 3 * program)
    start = tl.load(blocks + 3 * program + 1)
    length = tl.load(blocks + 3 * program + 2)
    row = pointers + 4 * tensor
    moment_type = tl.bfloat16 if ROUNDED else tl.float32
    parameter_address, gradient_address = tl.load(row), tl.load(row + 1)
    first_address, second_address = tl.load(row + 2), tl.load(row + 3)
    if ALIGNED:
        parameter_address = tl.multiple_of(parameter_address, 16)
        gradient_address = tl.multiple_of(gradient_address, 16)
        first_address = tl.multiple_of(first_address, 16)
        second_address = tl.multiple_of(second_address, 16)
        start = tl.multiple_of(start, SIZE)
    parameter_at = parameter_address.to(tl.pointer_type(tl.float32)) + start
    gradient_at = gradient_address.to(tl.pointer_type(tl.float32)) + start
    first_at = first_address.to(tl.pointer_type(moment_type)) + start
    second_at = second_address.to(tl.pointer_type(tl.float32)) + start
    offsets = tl.arange(0, SIZE)
    inside = offsets < length - start
    if tl.load(selected) != 0:
        parameter = tl.load(parameter_at + offsets, mask=inside, other=0.0)
        gradient = tl.load(gradient_at + offsets, mask=inside, other=0.0)
        stored = tl.load(first_at + offsets, mask=inside, other=0.0)
        second = tl.load(second_at + offsets, mask=inside, other=0.0)
        # As in the list operations: the product is rounded to the stored dtype before the gradient is added.
        moment = (stored.to(tl.float32) * decay1).to(moment_type).to(tl.float32) + gain1 * gradient
        second = second * decay2 + gain2 * gradient * gradient
        tl.store(first_at + offsets, moment.to(moment_type), mask=inside)
        tl.store(second_at + offsets, second, mask=inside)
        correction1, correction2 = tl.load(corrections), tl.load(corrections + 1)
        denominator = tl.sqrt_rn(second / correction2) + eps
        update = moment / correction1 / denominator + weight_decay * parameter
        tl.store(parameter_at + offsets, parameter - learning_rate * update, mask=inside)
        update = tl.where(inside, learning_rate * update, 0.0)
        tl.store(squares + program, tl.sum(update * update))
    else:
        tl.store(squares + program, 0.0)

"""Which numbers a step computes with: parameters, heads and losses stay float32, the rest may be bfloat16."""

import torch


def autocast(device: str, precision: torch.dtype) -> torch.autocast:
    """Autocast to `precision`; float32 switches it off."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype; "auto" is bfloat16 where the hardware multiplies it faster than float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32

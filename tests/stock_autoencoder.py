"""Stock diffusers autoencoders in the layout of FLUX.1's: 16 channels at 1/8, no quant convolutions."""

from typing import Any

from diffusers import AutoencoderKL


def kl(widths: tuple[int, ...] = (8, 8, 8, 8), blocks: int = 1, groups: int = 4) -> Any:
    """Random weights; `blocks` residual blocks a level of the encoder, one more in the decoder."""
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "latent_channels": 16,
        "norm_num_groups": groups,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**settings)

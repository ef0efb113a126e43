"""Entry points of torch.hub, e.g. `torch.hub.load(".", "encoder", "runs/mine", source="local")`."""

from openvision.inference.load import load as encoder
from openvision.inference.load import load_captioner as captioner
from openvision.inference.load import load_vision as vision

__all__ = ["captioner", "encoder", "vision"]

dependencies = ["torch", "numpy", "safetensors", "PIL", "tokenizers", "pydantic"]

"""OpenVision: a fully open family of vision encoders, in PyTorch."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openvision.inference.encoder import Encoder
    from openvision.inference.load import load, load_captioner, load_vision
    from openvision.inference.vision import VisionEncoder
    from openvision.weights.registry import available_models

__all__ = ["Encoder", "VisionEncoder", "available_models", "load", "load_captioner", "load_vision"]

try:
    __version__ = version("openvision-encoders")
except PackageNotFoundError:  # A source tree that was not installed.
    __version__ = "0+unknown"

_HOMES = {
    "Encoder": "openvision.inference.encoder",
    "VisionEncoder": "openvision.inference.vision",
    "available_models": "openvision.weights.registry",
    "load": "openvision.inference.load",
    "load_captioner": "openvision.inference.load",
    "load_vision": "openvision.inference.load",
}


def __getattr__(name: str) -> Any:
    # torch is heavy: `import openvision` alone must stay quick.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'openvision' has no attribute {name!r}")

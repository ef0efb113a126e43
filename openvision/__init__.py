"""OpenVision: a fully open family of vision encoders, in PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openvision.api import evaluate, train
    from openvision.inference.encoder import Encoder
    from openvision.inference.load import load, load_captioner, load_vision
    from openvision.inference.vision import VisionEncoder
    from openvision.weights.registry import available_models

    __version__: str

__all__ = [
    "Encoder",
    "VisionEncoder",
    "available_models",
    "evaluate",
    "load",
    "load_captioner",
    "load_vision",
    "train",
]

_HOMES = {
    "Encoder": "openvision.inference.encoder",
    "VisionEncoder": "openvision.inference.vision",
    "available_models": "openvision.weights.registry",
    "evaluate": "openvision.api",
    "load": "openvision.inference.load",
    "load_captioner": "openvision.inference.load",
    "load_vision": "openvision.inference.load",
    "train": "openvision.api",
}


def __getattr__(name: str) -> Any:
    # torch is heavy: `import openvision` alone must stay quick.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'openvision' has no attribute {name!r}")


def _version() -> str:
    # Reading the metadata of packages takes longer than all else that `import openvision` does.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("openvision-encoders")
    except PackageNotFoundError:  # A source tree that was not installed.
        return "0+unknown"

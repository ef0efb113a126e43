"""OpenVision: a fully open family of vision encoders, in PyTorch."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openvision.inference.encoder import Encoder

__all__ = ["Encoder", "load"]

try:
    __version__ = version("openvision-encoders")
except PackageNotFoundError:  # A source tree that was not installed.
    __version__ = "0+unknown"


def load(path: str) -> "Encoder":
    """Load an encoder from a model folder, e.g. `openvision.load("runs/quickstart/model")`.

    Raises OpenVisionError naming the file that is missing or broken.
    """
    from pathlib import Path

    from openvision.inference.encoder import Encoder

    return Encoder.load(Path(path))


def __getattr__(name: str) -> Any:
    # torch is heavy: `import openvision` alone must stay quick.
    if name == "Encoder":
        from openvision.inference.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'openvision' has no attribute {name!r}")

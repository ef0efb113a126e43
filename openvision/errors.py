"""Errors a user can act on, and the one way optional libraries are imported.

The command line prints an `OpenVisionError` as one sentence and exits with code 1; anything else is a bug and
keeps its traceback.
"""

import importlib
from types import ModuleType


class OpenVisionError(Exception):
    """Bad input or environment: the message names the file, key or value and the remedy."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional `module`, or say which extra of this distribution brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OpenVisionError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed; "
            f"run: pip install 'openvision-encoders[{extra}]'"
        ) from error

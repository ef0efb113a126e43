"""The error class for user errors, and the import of optional libraries.

The command line prints an `OpenVisionError` as one sentence and exits with code 1. Any other exception is a bug and
keeps its traceback.
"""

import importlib
from types import ModuleType


class OpenVisionError(Exception):
    """Bad input or environment. The message names the file, key or value, then the remedy."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional `module`; raises OpenVisionError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OpenVisionError(
            f"the package {module.split('.')[0]!r} is not installed; run: pip install 'openvision-encoders[{extra}]'"
        ) from error

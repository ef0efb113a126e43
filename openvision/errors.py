"""The error class for user errors, and the import of optional libraries.

The command line prints an `OpenVisionError` as one sentence and exits with code 1. Any other exception is a bug and
keeps its traceback.
"""

import errno
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


def describe_exhaustion(error: BaseException) -> str | None:
    """A sentence for an error that says that the machine has run out of something; None for other errors."""
    if isinstance(error, MemoryError):
        return "out of memory on this machine; use fewer loader threads and workers, or a smaller batch"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        name = f" ({error.filename})" if error.filename else ""
        return f"too many open files{name}; raise the limit with `ulimit -n`, or use fewer loader threads and workers"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        name = f" {error.filename}" if error.filename else ""
        return f"cannot write{name}: {error.strerror}; make room, then run the same command"
    return None

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
    """A sentence for an error that says that the machine has run out of something; None for other errors.

    Too many open files are found behind an OpenVisionError, too: what it says about its file would mislead.
    """
    if isinstance(error, MemoryError):
        return "out of memory on this machine; use fewer loader threads and workers, or a smaller batch"
    cause = error.__cause__ if isinstance(error, OpenVisionError) else error
    if not isinstance(cause, OSError):
        return None
    name = f" {cause.filename}" if cause.filename else ""
    if cause.errno in (errno.EMFILE, errno.ENFILE):
        return f"cannot open{name}: too many open files; raise the limit with `ulimit -n`, or use fewer loader workers"
    if cause is error and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write{name}: {cause.strerror}; make room, then run the same command"
    return None

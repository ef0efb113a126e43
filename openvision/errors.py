"""The error class for user errors, and the import of optional libraries.

The command line prints an `OpenVisionError` as one sentence and exits with code 1. Any other exception is a bug and
keeps its traceback.
"""

import errno
import importlib
from collections.abc import Mapping
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


# Kind of an error of pydantic -> what the value must be; {ge} and the like are its bounds.
_MUST_BE = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "literal_error": "{expected}",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dataclass_type": "a table",
    "dict_type": "a table",
}


def describe_value(kind: str, value: object, bounds: Mapping[str, object], message: str) -> str:
    """A value that pydantic refuses, in our words; `message`, pydantic's, where the kind is none of the usual ones."""
    if kind in ("too_short", "too_long"):
        least = kind == "too_short"
        number = bounds.get("min_length" if least else "max_length")
        noun = "entry" if number == 1 else "entries"
        length = bounds.get("actual_length")
        return f"it has {length}, and must have at {'least' if least else 'most'} {number} {noun}"
    if kind not in _MUST_BE:
        return message.removeprefix("Value error, ")
    return f"it is {value!r:.80}, and must be {_MUST_BE[kind].format(**bounds)}"

"""The error class for user errors, the import of optional libraries, and sentences for errors of others.

The command line prints an `OpenVisionError` as one sentence and exits with code 1. Any other exception is a bug and
keeps its traceback.
"""

import errno
import importlib
import re
from collections.abc import Mapping
from types import ModuleType


class OpenVisionError(Exception):
    """Bad input or environment. The message names the file, key or value, then the remedy."""


# Extras whose packages import torchvision, of which every version demands one version of torch.
_WITH_TORCHVISION = frozenset({"timm", "open-clip", "lpips", "fid"})


def require(module: str, extra: str) -> ModuleType:
    """Import an optional `module`; raises OpenVisionError that names the extra to install, or why the import fails."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or package).split(".")[0]
        needs = "" if missing == package else f" needs {missing!r}, which"
        raise OpenVisionError(f"the package {package!r}{needs} is not installed; run: {_install(extra)}") from error
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        # A package that is there and broken: installing the extra once more would change nothing.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OpenVisionError(
            describe_torchvision(error)
            or f"the package {package!r} is installed but cannot be imported: {reason}; reinstall it in a version that "
            f"openvision-encoders[{extra}] accepts"
        ) from error


def _install(extra: str) -> str:
    """The command that installs an extra, and keeps the torch that is there."""
    torch = f" torch=={_torch_version()[0]}" if extra in _WITH_TORCHVISION else ""
    return f"pip install 'openvision-encoders[{extra}]'{torch}"


def _torch_version() -> tuple[str, str]:
    """Version of torch, and its build: ("2.13.0", "cpu"); no build for wheels of PyPI."""
    # Its import costs a tenth of the start of a command.
    from importlib.metadata import version as installed

    version, _, build = installed("torch").partition("+")
    return version, build


def describe_torchvision(error: BaseException) -> str | None:
    """A sentence with the remedy for a torchvision that does not fit torch; None for other errors.

    transformers, timm and open_clip import torchvision, whose operators a foreign torch does not load.
    """
    if "operator torchvision::" not in str(error):
        return None
    version, build = _torch_version()
    fitting = ""
    if (numbers := re.fullmatch(r"2\.(\d+)\.(\d+)", version)) is not None:
        # torch 2.0 came with torchvision 0.15, and each minor version since with the next one.
        fitting = f"==0.{int(numbers[1]) + 15}.{numbers[2]}"
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return (
        f"the installed torchvision was built for another torch than {version}{'+' * bool(build)}{build}; run: "
        f"pip install --force-reinstall --no-deps torchvision{fitting}{index}"
    )


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

"""Parse ranges of the command line."""

from openvision.errors import OpenVisionError
from openvision.hardware import Range


def range_argument(name: str, text: str | None, default: Range) -> Range:
    """Lowest and highest value of "0.4" or "0.3-0.45"; `default` for None.

    Raises OpenVisionError for anything else; `name` is the option, for the message.
    """
    if text is None:
        return default
    low, _, high = text.partition("-")
    try:
        values = float(low), float(high or low)
    except ValueError:
        raise OpenVisionError(f"{name} {text!r} is neither a number nor a range such as 0.3-0.45") from None
    if not 0 <= values[0] <= values[1] < float("inf"):
        raise OpenVisionError(f"{name} {text!r} must be from low to high, e.g. 0.3-0.45")
    return values

"""transformers, imported late and kept quiet while it loads and saves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openvision.errors import require


def transformers() -> Any:
    """The library, or OpenVisionError that names the extra."""
    return require("transformers", extra="vlm")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings: what goes wrong while loading is checked by the callers."""
    logging = require("transformers.utils.logging", extra="vlm")
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""Pages from the templates of this package: everything inside one file, whatever comes from data escaped."""

import base64
from collections.abc import Callable
from importlib import resources
from typing import Any

from openvision.errors import require


def render(template: str, context: dict[str, Any], **filters: Callable[..., str]) -> str:
    """Fill a template of `templates/`; a name that is missing in the context is an error."""
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= filters
    return environment.get_template(template).render(context)


def _read(name: str) -> str:
    return resources.files("openvision.evaluation.report").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def png_uri(png: bytes) -> str:
    """A PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"

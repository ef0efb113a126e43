"""Pages from the templates of this package: everything inside one file, all text from data escaped."""

from collections.abc import Mapping
from importlib import resources

from openvision.errors import require


def render(template: str, context: Mapping[str, object]) -> str:
    """Fill a template of `templates/`; a name that is missing in the context is an error."""
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(context)


def _read(name: str) -> str:
    return resources.files("openvision.evaluation.report").joinpath(f"templates/{name}").read_text(encoding="utf-8")

"""What a captioner is asked: the paper's prompt, the same with the alt-text, or a Jinja template of the user's.

Templates run in Jinja's sandbox: a template from elsewhere reaches no attribute of Python's objects.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from openvision.errors import OpenVisionError, require
from openvision.files import read_text

if TYPE_CHECKING:
    from jinja2 import Template

_DETAILED = "Please generate a detailed caption of this image. Please be as descriptive as possible."
_ALT = "{{ alt }}"
# The wording that conditioned the captions of OpenVision 2 on the alt-text was not published; this one is ours.
BUILT_IN = {
    "v1": _DETAILED,
    "v2": f"{_DETAILED} The web page describes it as: {_ALT}",
}


@dataclass(frozen=True)
class Prompt:
    """A Jinja template with the variables `alt`, `key` and `number` (which of the captions of an image, from 0)."""

    text: str
    source: str = "template"
    """Its file, for messages."""
    _compiled: "list[Template]" = field(default_factory=list, compare=False, repr=False)

    def __reduce__(self) -> tuple[type["Prompt"], tuple[str, str]]:
        # A compiled template does not reach another process.
        return Prompt, (self.text, self.source)

    @property
    def sha256(self) -> str:
        """Identity of the prompt, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, alt: str, key: str = "", number: int = 0) -> str:
        """The prompt for one caption; raises OpenVisionError for a template with a mistake."""
        parts = self.text.split(_ALT)
        if not any(mark in part for part in parts for mark in ("{{", "{%", "{#")):
            # The built-in prompts need no library.
            return alt.join(parts)
        jinja2 = require("jinja2", extra="report")
        try:
            if not self._compiled:
                sandbox = require("jinja2.sandbox", extra="report")
                environment = sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
                self._compiled.append(environment.from_string(self.text))
            return self._compiled[0].render(alt=alt, key=key, number=number).strip()
        # A template may divide by zero or add a number to a text: whatever it does is a mistake of its author.
        except Exception as error:
            raise OpenVisionError(
                f"{self.source} cannot be filled: {type(error).__name__}: {error}; its variables are alt, key, number"
            ) from error


def load_prompt(template: str) -> Prompt:
    """A built-in prompt by name, or the template in a file; raises OpenVisionError."""
    if template in BUILT_IN:
        return Prompt(BUILT_IN[template], f"template {template}")
    text = read_text(Path(template)).strip()
    if not text:
        raise OpenVisionError(f"the template {template} is empty; write the prompt into it")
    if "{alt}" in text.replace(_ALT, ""):
        raise OpenVisionError(f"the template {template} says {{alt}}; write {{{{ alt }}}} where the alt-text belongs")
    prompt = Prompt(text, f"the template {template}")
    prompt.fill("an alt-text")
    return prompt

"""What a captioner is asked: the paper's prompt, the same with the alt-text, or a file of the user's."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.files import read_text

_DETAILED = "Please generate a detailed caption of this image. Please be as descriptive as possible."
# The wording that conditioned the captions of OpenVision 2 on the alt-text was not published; this one is ours.
BUILT_IN = {
    "v1": _DETAILED,
    "v2": f"{_DETAILED} The web page describes it as: {{alt}}",
}
_ALT = "{alt}"


@dataclass(frozen=True)
class Prompt:
    """A text in which `{alt}` stands for the alt-text of the image."""

    text: str

    @property
    def sha256(self) -> str:
        """Identity of the prompt, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, alt: str) -> str:
        """The prompt for one image."""
        return self.text.replace(_ALT, alt)


def load_prompt(template: str) -> Prompt:
    """A built-in prompt by name, or the text of a file; raises OpenVisionError."""
    if template in BUILT_IN:
        return Prompt(BUILT_IN[template])
    text = read_text(Path(template)).strip()
    if not text:
        raise OpenVisionError(f"the template {template} is empty; write the prompt into it")
    return Prompt(text)

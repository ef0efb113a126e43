"""Prompt templates and class names: from files, from an installed open_clip_torch, or a short list of our own.

| protocol     | templates                     | texts                                   | reads                |
|--------------|-------------------------------|-----------------------------------------|----------------------|
| `plain`      | "{}"                          | as they are                             | nothing              |
| `short`      | six of our own                | as they are                             | nothing              |
| `openvision` | OpenAI's 80 and "{}", spec 7  | canonicalised, names split at commas    | open_clip_torch      |
| `open_clip`  | OpenAI's 80                   | as they are                             | open_clip_torch      |
| a file       | its lines, or its JSON list   | as they are                             | the file             |
| a list       | its entries                   | as they are                             | nothing              |

Class names likewise: `imagenet` reads the 1,000 of open_clip_torch, anything else is a file of names.
"""

import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from openvision.encoding import PLAIN, check_templates
from openvision.errors import OpenVisionError, require

# A short list of our own for drawings and photographs alike.
PROMPTS = (
    "{}",
    "a picture of {}",
    "a drawing of {}",
    "a small icon of {}",
    "a close view of {}",
    "{} on a white background",
)
OWN = {"plain": PLAIN, "short": PROMPTS}
PROTOCOLS = (*OWN, "openvision", "open_clip")
IMAGENET = "imagenet"

# Texts encoded at a time: 81 prompts for each of 1,000 classes would be 250 MB of vectors.
_PROMPTS_AT_A_TIME = 8192


@dataclass(frozen=True)
class Protocol:
    """How a class name becomes texts."""

    name: str
    templates: tuple[str, ...]
    canonical: bool = False
    """Texts in lower case without punctuation, and a name with commas is several names (spec section 7)."""

    def names(self, name: str) -> list[str]:
        """The aliases of a class."""
        if not self.canonical:
            return [name]
        return [alias.strip() for alias in canonicalize(name, keep=",").split(",") if alias.strip()]

    def prompts(self, name: str) -> list[str]:
        """Every template filled with every alias of a class."""
        templates = [canonicalize(one, keep="{}") if self.canonical else one for one in self.templates]
        return [template.replace("{}", alias) for alias in self.names(name) for template in templates]


def canonicalize(text: str, keep: str = "") -> str:
    """Lower case, ASCII punctuation deleted but `keep`, underscores and runs of blanks one blank (spec section 7)."""
    bare = text.replace("_", " ")
    drop = str.maketrans("", "", string.punctuation)
    bare = keep.join(part.translate(drop) for part in bare.split(keep)) if keep else bare.translate(drop)
    return re.sub(r"\s+", " ", bare.lower()).strip()


def protocol(name: str | Sequence[str], base: Path | None = None) -> Protocol:
    """The protocol of a name, of a file of templates relative to `base`, or of the templates themselves."""
    if not isinstance(name, str):
        check_templates(name)
        return Protocol("; ".join(name), tuple(name))
    if name in OWN:
        return Protocol(name, OWN[name])
    if name in PROTOCOLS:
        templates = _open_clip_templates()
        return Protocol(name, (*templates, "{}"), True) if name == "openvision" else Protocol(name, templates)
    path = _resolve(name, base)
    if not path.is_file():
        raise OpenVisionError(f"{name!r} is neither a prompt set ({', '.join(PROTOCOLS)}) nor a file of templates")
    # clip_benchmark's files write {c} for the class.
    templates = tuple(template.replace("{c}", "{}") for template in _lines(path))
    check_templates(templates)
    return Protocol(str(name), templates)


def class_names(source: str, base: Path | None = None) -> list[str]:
    """Names of classes in the order of their numbers: `imagenet`, a file of lines, or a JSON list."""
    if source == IMAGENET:
        return list(_open_clip().IMAGENET_CLASSNAMES)
    path = _resolve(source, base)
    if not path.is_file():
        raise OpenVisionError(f"file of class names {path} does not exist; a line a class, or {IMAGENET!r}")
    return _lines(path)


def _resolve(name: str, base: Path | None) -> Path:
    path = Path(name)
    return path if path.is_absolute() or base is None or path.is_file() else base / path


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
        entries: object = json.loads(content) if path.suffix == ".json" else content.rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise OpenVisionError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise OpenVisionError(f"{path} must be a JSON list of texts, or a text a line")
    return [str(entry).strip() for entry in entries]


def _open_clip() -> ModuleType:
    """Names and templates of open_clip_torch. Only its table is imported: the package itself wants torchvision."""
    import importlib.util

    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        require("open_clip", extra="open-clip")
        raise AssertionError("require raises for a package that is not there")
    path = Path(found.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise OpenVisionError(f"{path} is missing: this open_clip_torch keeps its class names elsewhere")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _open_clip_templates() -> tuple[str, ...]:
    """Its templates are functions of the name; filled with "{}" they are templates again."""
    templates = tuple(template("{}") for template in _open_clip().OPENAI_IMAGENET_TEMPLATES)
    check_templates(templates)
    return templates


def first_alike(names: Sequence[str], how: Protocol) -> NDArray[np.int64]:
    """For each class the number of the first class with the same texts (c,): its own, unless a name repeats.

    ImageNet has "missile" and "sunglasses" twice.
    """
    first: dict[tuple[str, ...], int] = {}
    return np.array([first.setdefault(tuple(how.prompts(name)), at) for at, name in enumerate(names)], dtype=np.int64)


def classifier(
    encode: Callable[[Sequence[str]], NDArray[np.float32]], names: Sequence[str], how: Protocol
) -> NDArray[np.float32]:
    """Unit vectors (c, E): the mean of a class's unit text vectors over all prompts, divided by (norm + 1e-8).

    Classes of the same texts are encoded once and tie exactly, wherever in the list they are.
    """
    check_templates(how.templates)
    if empty := [name for name in names if not how.prompts(name)]:
        raise OpenVisionError(f"the class name {empty[0]!r} holds no letter or digit: no prompt can be made of it")
    distinct, place = np.unique(first_alike(names, how), return_inverse=True)
    prompts = [how.prompts(names[int(number)]) for number in distinct]
    vectors: list[NDArray[np.float32]] = []
    start = 0
    while start < len(prompts):
        stop = start + 1
        while stop < len(prompts) and sum(map(len, prompts[start : stop + 1])) <= _PROMPTS_AT_A_TIME:
            stop += 1
        encoded = encode([text for own in prompts[start:stop] for text in own])
        ends = np.cumsum([len(own) for own in prompts[start:stop]])[:-1]
        vectors += [part.mean(axis=0) for part in np.split(encoded, ends)]
        start = stop
    mean = np.stack(vectors)[place]
    return (mean / (np.linalg.norm(mean, axis=1, keepdims=True) + 1e-8)).astype(np.float32)

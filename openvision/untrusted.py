"""Names, texts and numbers that strangers wrote (docs/security.md): check them, make file names of them, print them.

What comes from data never decides which folder a file is in, and never reaches a terminal as a control character.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openvision.errors import OpenVisionError

# Control characters of terminals (C0 without tab and newline, C1), what reorders or breaks lines, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_IN_NAMES = re.compile(r"[^\w.-]+")
# Names may have 255 bytes; 40 are left for a suffix and for the temporary name while the file is written.
_NAME_BYTES = 200


def load_json(data: str | bytes) -> Any:
    """What JSON text says; raises ValueError for all that cannot be parsed, also for too deep nesting."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_count(name: str, value: object, least: int, most: int) -> int:
    """`value` if it is an integer from `least` to `most`; raises ValueError that names it otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, not {value!r:.80}")
    return value


def is_texts(value: object) -> bool:
    """Whether a value from JSON is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def decode_text(data: bytes) -> tuple[str, bool]:
    """A text file's content without its byte order mark, and whether it was UTF-8.

    Other text is UTF-16 if it begins with that mark, else Windows-1252, which holds Latin-1: no letter is lost.
    """
    try:
        return data.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        pass
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            return data.decode("utf-16"), False
        except UnicodeDecodeError:
            pass
    # Windows-1252 leaves five bytes undefined; Latin-1 has a control character for each.
    try:
        return data.decode("cp1252"), False
    except UnicodeDecodeError:
        return data.decode("latin-1"), False


def is_utf8(text: str) -> bool:
    """Whether `text` can be written as UTF-8: it has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """`text` with control characters spelt out (`\\x1b`, `\\u202e`); tabs and newlines stay."""
    return _UNPRINTABLE.sub(_spelt, text)


def one_line(text: str) -> str:
    """`printable`, with tabs and newlines spelt out too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def json_text(value: object, indent: int | None = None, default: Callable[[object], object] | None = None) -> str:
    """JSON for files that people read: in letters of all languages, but without anything that a terminal obeys."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=default)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def safe_name(*names: str) -> str:
    """A file name of letters, digits, `.`, `-` and `_`, made of the first of `names` that has any.

    It begins with no dot, is no folder's, and has at most 200 bytes; without any letter it is a hash of the last name.
    """
    for name in names:
        clean = _UNSAFE_IN_NAMES.sub("-", name).encode()[:_NAME_BYTES].decode("utf-8", "ignore").strip("-.")
        if clean:
            return clean
    return hashlib.sha256(names[-1].encode("utf-8", "surrogatepass")).hexdigest()[:16]


def path_inside(folder: Path, name: str) -> Path:
    """The path of `name`, from data, in `folder`; raises OpenVisionError when it is absolute or leads out by `..`.

    Links in the folder are followed: who owns the folder made them.
    """
    inside = os.path.normpath(name) if name and "\0" not in name else os.pardir
    if os.path.isabs(inside) or inside in (os.curdir, os.pardir) or inside.startswith(os.pardir + os.sep):
        raise OpenVisionError(f"{one_line(name)!r} does not name a file inside {folder}; correct the name in the data")
    return folder / inside


def _spelt(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

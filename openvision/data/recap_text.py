"""Captions that were decoded wrongly on their way into a table, put right where there is no doubt.

Two kinds are met in the release. UTF-8 bytes spelt out as text (`CLR\\xc2\\xae`): nobody writes that, it is mended
wherever the bytes make characters. UTF-8 read as Windows-1252 (`cafÃ©`): here correct texts look alike (`NESCAFÉ®` and
`AMANHÃ…` are valid UTF-8 when read backwards), so a text is mended only if it holds a sequence that no correct text
has and the whole of it can be decoded again.
"""

import re

_ESCAPED = re.compile(r"(?:\\x[89A-Fa-f][0-9A-Fa-f])+")


def _windows_bytes() -> dict[str, int]:
    table = {chr(code): code for code in range(256)}
    for code in range(0x80, 0xA0):
        # Five codes have no character in Windows-1252; programs leave them as the control characters they are.
        table[bytes([code]).decode("cp1252", errors="ignore") or chr(code)] = code
    return table


_BYTES = _windows_bytes()
_TAIL = "[" + re.escape("".join(character for character, code in _BYTES.items() if 0x80 <= code < 0xC0)) + "]"
# A euro sign or low quote after a-circumflex, eth before Y-diaeresis, a capital in a small word, a control character.
_PROOF = re.compile(rf"â[€‚„]{_TAIL}|ðŸ{_TAIL}{_TAIL}|[a-z][ÂÃ]{_TAIL}|[À-ô][\x80-\x9f]")


def mend(text: str) -> str:
    """The text with what is provably mis-decoded put right; anything else comes back as it is."""
    if "\\x" in text:
        text = _ESCAPED.sub(_unescape, text)
    if text.isascii() or not _PROOF.search(text):
        return text
    codes = [_BYTES.get(character) for character in text]
    try:
        return bytes(code for code in codes if code is not None).decode("utf-8") if None not in codes else text
    except UnicodeDecodeError:
        return text


def _unescape(match: re.Match[str]) -> str:
    try:
        return bytes.fromhex(match[0].replace("\\x", "")).decode("utf-8")
    except UnicodeDecodeError:
        return match[0]

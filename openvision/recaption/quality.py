"""Faults of captions, found by rules: what a captioner writes when it does not describe the image.

The phrases of refusals and boilerplate are English.
"""

import re
from collections import Counter
from itertools import pairwise

from openvision.recaption.language import is_other_language

_REFUSAL = re.compile(
    r"^(i'?m sorry|i am sorry|sorry,|i (can ?not|can't|am unable to)|i'm unable to|as an ai\b|unfortunately, i)"
)
_BOILERPLATE = re.compile(
    r"^(sure[,!.]|certainly[,!.]|of course[,!.]|here('s| is) (a|the) (detailed )?(caption|description)\b)"
)
# A run of this many words that occurs this often is a loop; a list of colours or a refrain stays below.
_LOOP_WORDS, _LOOP_TIMES = 4, 4
_SAME_WORD = 6
_ECHO = 30


def find_fault(caption: str, prompt: str, cut: bool, language: str | None = None) -> str | None:
    """Why a caption is bad: empty, refusal, prompt_echo, boilerplate, looping, language or cut; None for a good one.

    `cut` says that the captioner stopped at its longest length; `language` is the one asked for, None for any.
    """
    text = " ".join(caption.lower().replace("\u2019", "'").split())
    if not re.search(r"\w", text):
        return "empty"
    if _REFUSAL.match(text):
        return "refusal"
    if " ".join(prompt.lower().split())[:_ECHO] in text and len(prompt) >= _ECHO:
        return "prompt_echo"
    if _BOILERPLATE.match(text):
        return "boilerplate"
    if _loops(text.split()):
        return "looping"
    if language is not None and is_other_language(caption, language):
        return "language"
    return "cut" if cut else None


def _loops(words: list[str]) -> bool:
    run = 1
    for before, word in pairwise(words):
        run = run + 1 if word == before else 1
        if run >= _SAME_WORD:
            return True
    runs = Counter(tuple(words[i : i + _LOOP_WORDS]) for i in range(len(words) - _LOOP_WORDS + 1))
    return max(runs.values(), default=0) >= _LOOP_TIMES

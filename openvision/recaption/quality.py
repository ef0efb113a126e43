"""Faults of captions, found by rules: what a captioner writes when it does not describe the image.

The phrases of refusals and boilerplate are English. A language is told by the words that are in every sentence of it,
and by its script: no model, no dependency; a short caption has too few such words for a verdict.
"""

import re
import unicodedata
from collections import Counter
from itertools import pairwise

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

# Frequent words that no other language of the list shares, accents included.
_WORDS = {
    "en": "the and with this that there which from are was has its his her their while into over it's an on at of by",
    "de": "der das und ist mit ein eine einem einen auf dem den nicht sich auch wird sind ein über vor",
    "fr": "les des est une avec dans sur qui sont aux cette ce ces elle du au leur plusieurs",
    "es": "el los las una con y está están muy su sobre es del hay esta este que por",
    "it": "il gli una con della nella che è sono di sullo alla questa nel sul un'immagine",
    "pt": "os uma com não está são em na do da pela ao muito esta imagem",
    "nl": "het een van zijn met op er aan voor niet ook naar bij staat",
}
_SETS = {language: frozenset(words.split()) for language, words in _WORDS.items()}
LANGUAGES = tuple(_WORDS)
# Fewer frequent words than this decide nothing.
_EVIDENCE = 3
_FOREIGN_LETTERS = 0.3
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


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


def is_other_language(text: str, expected: str) -> bool:
    """Whether a caption is clearly not in the language `expected`, one of LANGUAGES."""
    letters = [character for character in text if character.isalpha()]
    if letters:
        foreign = sum(not unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
        if foreign / len(letters) > _FOREIGN_LETTERS:
            return True
    words = [word.lower().replace("’", "'") for word in _WORD.findall(text)]
    found = {language: sum(word in known for word in words) for language, known in _SETS.items()}
    own = found.pop(expected)
    return max(found.values()) >= _EVIDENCE and max(found.values()) > 2 * own

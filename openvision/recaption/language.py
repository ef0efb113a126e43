"""Which language a caption is written in: as much as it takes to find captions in another one than asked for.

By the words that are in every sentence of a language, and by its script. No model, no dependency; a short caption has
too few such words, and is given the benefit of the doubt.
"""

import re
import unicodedata

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

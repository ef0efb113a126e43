"""Normalisation of answers: VQA's rules, yes or no, a chosen letter.

The rules are those of the official evaluators, with their oddities, because published numbers were computed with them.
"""

import re

# A missing apostrophe is restored in these words: removing any single one gives the key.
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've "
)
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
# The official evaluator passes a flag of value 32 to a parameter that counts replacements.
_MOST_PERIODS = 32


def vqa_answer(text: str) -> str:
    """An answer in the normal form of VQA and TextVQA: "The two mountain's" -> "2 mountain 's"."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Punctuation beside a space is removed, other punctuation becomes a space; periods go unless a digit follows."""
    commas = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or commas else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def exact_answer(text: str) -> str:
    """An answer in the normal form of GQA: lower case, without punctuation and outer spaces."""
    return re.sub(r"[^\w\s]", "", text.lower()).strip()


def starts_yes_or_no(text: str) -> str:
    """MME's rule: yes, no or other, from the first four characters."""
    text = text.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def says_no(text: str) -> bool:
    """POPE's rule: whether the first sentence has the word no or not; every other answer counts as yes."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return any(word in ("No", "no", "not") for word in words)


_LETTER = re.compile(r"^\(?([A-Z])\)?\.?$|^([A-Z])[.:)]\s?")
_SENTENCE = re.compile(r"[Tt]he (?:correct )?answer is \(?([A-Z])\b")


def letter(text: str) -> str | None:
    """The option that an answer chooses: "B", "b", "B. blue" or "The answer is B."; None when it chooses none."""
    text = text.strip()
    if len(text) == 1 and text.isalpha():
        return text.upper()
    found = _LETTER.match(text)
    if found:
        return found[1] or found[2]
    said = _SENTENCE.findall(text)
    return said[0] if len(said) == 1 else None

"""Training and held-out splits, which tell compositional generalisation from memorised names.

- Compositional: every part of a name (role, gender, skin tone, hair, direction) occurs in training, the combination
  does not. More than half are held out as whole families, for instance all skin tones of (woman, scientist), so that
  the name differs from every training name in more than a skin tone.
- Random: any name.
- Validation: half compositional, half random; every choice is made on it.

Names are picked in the order of their hashes, so nothing depends on the version of a random generator. The result is
committed as split.json, and a test recomputes it.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.resources import files

from openvision.data.sources.openmoji.names import EmojiName

TRAIN, VALIDATION = "train", "validation"
COMPOSITIONAL, RANDOM = "heldout_compositional", "heldout_random"
SPLITS = (TRAIN, VALIDATION, COMPOSITIONAL, RANDOM)
_FILE = "split.json"

# Images held out per split: whole families, single skin tones, any name.
_FAMILIES = {COMPOSITIONAL: 230, VALIDATION: 115}
_SINGLES = {COMPOSITIONAL: 170, VALIDATION: 80}
_AT_RANDOM = {RANDOM: 390, VALIDATION: 195}
_GENDERS = ("man", "woman", "person")


def committed_split() -> dict[str, str]:
    """Name -> split, for all names outside the training split."""
    content = json.loads(files("openvision.data.sources.openmoji").joinpath(_FILE).read_text(encoding="utf-8"))
    return {name: split for split, names in content["names"].items() for name in names}


def make_split(names: Iterable[EmojiName]) -> dict[str, str]:
    """Name -> split, for all names to keep out of the training split."""
    ordered = sorted(names, key=lambda name: _rank(name.text))
    held: dict[str, str] = {}
    _hold_families(ordered, held)
    _hold_singles(ordered, held)
    _hold_at_random(ordered, held)
    return held


def _rank(text: str) -> bytes:
    return hashlib.sha256(f"openmoji split 2: {text}".encode()).digest()


def _hold_families(ordered: list[EmojiName], held: dict[str, str]) -> None:
    """Hold out whole (role, gender) families whose role occurs in training with other genders."""
    families: dict[str, list[EmojiName]] = defaultdict(list)
    roles: dict[tuple[str, bool, str | None], set[str]] = defaultdict(set)
    for name in ordered:
        if name.kind == "person" and name.gender in _GENDERS and (name.role or name.hair):
            families[name.bare].append(name)
            roles[_role_of(name)].add(name.gender)
    taken: set[tuple[str, bool, str | None]] = set()
    for split, wanted in _FAMILIES.items():
        count = 0
        for bare in sorted(families, key=lambda bare: _rank(f"family {bare}")):
            role = _role_of(families[bare][0])
            # At most one gender of a role over both splits: training needs the role with the others.
            if count >= wanted or role in taken or len(roles[role]) < 2 or len(families[bare]) < 5:
                continue
            taken.add(role)
            held.update((name.text, split) for name in families[bare])
            count += len(families[bare])


def _role_of(name: EmojiName) -> tuple[str, bool, str | None]:
    return name.role, name.faces_right, name.hair


def _hold_singles(ordered: list[EmojiName], held: dict[str, str]) -> None:
    """Hold out single skin tones of names that occur in training with other tones."""
    per_bare: Counter[str] = Counter()
    for split, wanted in _SINGLES.items():
        count = 0
        for name in ordered:
            if count < wanted and name.tones and name.text not in held and per_bare[name.bare] < len(name.tones):
                per_bare[name.bare] += 1
                held[name.text] = split
                count += 1


def _hold_at_random(ordered: list[EmojiName], held: dict[str, str]) -> None:
    """Hold out any name that is not the last one in training with a word of a compositional name."""
    needed = {word for text in held for word in text.split()}
    teachers = Counter(word for name in ordered if name.text not in held for word in set(name.text.split()))
    roles = Counter(name.role for name in ordered if name.text not in held)
    for split, wanted in _AT_RANDOM.items():
        count = 0
        for name in ordered:
            if count >= wanted or name.text in held:
                continue
            words = set(name.text.split())
            if roles[name.role] > 1 or not name.gender:
                if any(teachers[word] <= 1 for word in words & needed):
                    continue
                held[name.text] = split
                teachers.subtract(words)
                roles[name.role] -= 1
                count += 1

"""Which pictures are trained on, and which are kept to see whether parts were learnt or names by heart.

- Compositional: every part of a name (role, gender, skin tone, hair, direction) is seen in training, never together.
  More than half are held out as whole families, all skin tones of (woman, scientist) for instance, so that the name
  differs from every training name in more than a skin tone.
- Random: any name.
- Validation: half of it compositional, half random; every choice is made on it.

The order of picking is a hash of the name: nothing depends on a random generator's version. The result is committed
as split.json and a test makes it again.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.resources import files

from openvision.data.sources.openmoji.names import Name

TRAIN, VALIDATION = "train", "validation"
COMPOSITIONAL, RANDOM = "heldout_compositional", "heldout_random"
SPLITS = (TRAIN, VALIDATION, COMPOSITIONAL, RANDOM)
_FILE = "split.json"

# Pictures of a held-out family and single skin-tone variants, for each compositional set; random pictures.
_FAMILIES = {COMPOSITIONAL: 230, VALIDATION: 115}
_SINGLES = {COMPOSITIONAL: 170, VALIDATION: 80}
_AT_RANDOM = {RANDOM: 390, VALIDATION: 195}
_GENDERS = ("man", "woman", "person")


def committed_split() -> dict[str, str]:
    """Name -> split, for the names that are not trained on."""
    content = json.loads(files("openvision.data.sources.openmoji").joinpath(_FILE).read_text(encoding="utf-8"))
    return {name: split for split, names in content["names"].items() for name in names}


def make_split(names: Iterable[Name]) -> dict[str, str]:
    """Assign a split to every name that is not trained on."""
    ordered = sorted(names, key=lambda name: _rank(name.text))
    held: dict[str, str] = {}
    _hold_families(ordered, held)
    _hold_singles(ordered, held)
    _hold_at_random(ordered, held)
    return held


def _rank(text: str) -> bytes:
    return hashlib.sha256(f"openmoji split 2: {text}".encode()).digest()


def _hold_families(ordered: list[Name], held: dict[str, str]) -> None:
    """Hold out whole (role, gender) families whose role is seen with the other genders."""
    families: dict[str, list[Name]] = defaultdict(list)
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
            # One gender of a role at most, over both sets: the others teach the role.
            if count >= wanted or role in taken or len(roles[role]) < 2 or len(families[bare]) < 5:
                continue
            taken.add(role)
            held.update((name.text, split) for name in families[bare])
            count += len(families[bare])


def _role_of(name: Name) -> tuple[str, bool, str | None]:
    return name.role, name.faces_right, name.hair


def _hold_singles(ordered: list[Name], held: dict[str, str]) -> None:
    """Hold out single skin tones of names that are seen with the other tones."""
    per_bare: Counter[str] = Counter()
    for split, wanted in _SINGLES.items():
        count = 0
        for name in ordered:
            if count < wanted and name.tones and name.text not in held and per_bare[name.bare] < len(name.tones):
                per_bare[name.bare] += 1
                held[name.text] = split
                count += 1


def _hold_at_random(ordered: list[Name], held: dict[str, str]) -> None:
    """Hold out any name that is not the last to teach a word of a compositional one."""
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


def is_more_than_a_tone(name: Name, training: Iterable[Name]) -> bool:
    """Whether no training name equals `name` without skin tones."""
    return name.bare not in {other.bare for other in training}

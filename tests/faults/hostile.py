"""Files that nobody should trust, made from good ones: values of JSON and TOML mutated, bytes damaged, names taken.

A reader must end in one sentence or read the file; a traceback, a hang and a message of many lines are failures.
"""

import copy
import json
import os
import random
import secrets
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from openvision.errors import OpenVisionError
from openvision.training.checkpoint.folders import DamagedCheckpointError

# A seconds-sized sample, and what `make test-slow` tries.
SIZES = [pytest.param(1, id="sample"), pytest.param(8, id="all", marks=pytest.mark.slow)]
SECONDS = 20
LONGEST_MESSAGE = 2000
VALUES = (
    *(None, True, -1, 0, 1, 2, 3, 2**31, 2**63, 10**30, -0.5, 2.0, 1e308, float("inf"), float("nan")),
    *("", "x", "../..", "\x1b[2J", [], [1], [[]], {}, {"x": 1}),
)


@dataclass
class Count:
    """What became of the tries, by kind."""

    tried: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def attempt(self, kind: str, what: str, read: Callable[[], object]) -> None:
        """Read once; what is neither read nor refused in one sentence is a failure."""
        self.tried[kind] += 1
        try:
            with deadline(SECONDS):
                read()
        except (OpenVisionError, DamagedCheckpointError) as error:
            if len(str(error)) > LONGEST_MESSAGE or "Traceback" in str(error):
                self.failures.append(f"{kind}, {what}: {str(error)[:200]!r}")
                return
        except BaseException as error:
            # The tokenizers library panics with a BaseException.
            self.failures.append(f"{kind}, {what}: {type(error).__name__} {str(error)[:200]!r}")
            return
        self.kept[kind] += 1

    def table(self) -> str:
        """Tried and kept by kind, one a line."""
        return "\n".join(f"{kind:<28} {self.tried[kind]:>4} tried {self.kept[kind]:>4} kept" for kind in self.tried)


def generator(seed: int, times: int) -> random.Random:
    """Random numbers of a test: the same in every sample; otherwise of FAULTS_SEED or a new seed, which is printed."""
    if times > 1:
        seed = int(os.environ.get("FAULTS_SEED") or secrets.randbelow(2**32))
        print(f"\nFAULTS_SEED={seed}")
    return random.Random(seed)


def conclude(count: Count, least: int, times: int) -> None:
    """Print the count; fail where a try failed, or where there were fewer than `least` at full size (8 times)."""
    print("\n" + count.table())
    assert not count.failures, "\n".join(count.failures)
    assert sum(count.tried.values()) >= least * times // 8
    assert count.tried == count.kept


class LateError(Exception):
    """A reader took longer than SECONDS."""


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise LateError in the main thread after `seconds`."""

    def late(*_: object) -> None:
        raise LateError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


Place = tuple[str | int, ...]


def places_in(value: object, place: Place = ()) -> Iterator[Place]:
    """The place of every value in nested objects and arrays; of an array the first two."""
    yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places_in(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:2]):
            yield from places_in(item, (*place, index))


def mutate(value: object, rng: random.Random) -> tuple[str, object]:
    """A copy with one value replaced, removed or added, and what was done."""
    changed = copy.deepcopy(value)
    place = rng.choice(list(places_in(changed))[1:] or [()])
    if not place:
        return "replaced", rng.choice(VALUES)
    node = changed
    for key in place[:-1]:
        node = node[key]  # pyright: ignore[reportIndexIssue]
    assert isinstance(node, dict | list)
    action = rng.choice(("replace", "replace", "replace", "replace", "remove", "add"))
    if action == "remove":
        del node[place[-1]]  # pyright: ignore[reportArgumentType, reportCallIssue]
    elif action == "add" and isinstance(node, dict):
        node["unknown key"] = rng.choice(VALUES)
    else:
        node[place[-1]] = rng.choice(VALUES)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return f"{action} {'.'.join(map(str, place))}: {node}"[:200], changed


def mutated_json(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A JSON file with one value changed."""
    what, changed = mutate(json.loads(data), rng)
    return what, json.dumps(changed).encode()


def damaged_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A file cut, overwritten, emptied or replaced."""
    changed = bytearray(data)
    at = rng.randrange(max(len(data), 1))
    span = slice(at, at + rng.choice((1, 8, 512)))
    ways = {
        "cut": lambda: changed[:at],
        "zeros": lambda: bytes(changed[:at]) + bytes(len(changed[span])) + bytes(changed[span.stop :]),
        "noise": lambda: bytes(changed[:at]) + rng.randbytes(len(changed[span])) + bytes(changed[span.stop :]),
        "begins with noise": lambda: rng.randbytes(16) + bytes(changed[16:]),
        "empty": lambda: b"",
        "noise alone": lambda: rng.randbytes(256),
        "nested": lambda: b"[" * 100_000,
        "not UTF-8": lambda: b'{"a": "\xff\xfe"}',
    }
    what = rng.choice(list(ways))
    return f"{what} at {at}", bytes(ways[what]())


NAMES = ("pipe", "dangling link", "folder", "link to itself")


def take_name(path: Path, what: str) -> str:
    """Put something of NAMES in the place of a file."""
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if what == "link to itself" else path.with_name("nowhere"))
    return what


def damage(path: Path, rng: random.Random) -> str:
    """Damage one file in place; returns how."""
    data = path.read_bytes()
    way = rng.choice(("values", "values", "bytes", "name") if path.suffix == ".json" else ("bytes", "bytes", "name"))
    if way == "name":
        return take_name(path, rng.choice(NAMES))
    what, changed = mutated_json(data, rng) if way == "values" else damaged_bytes(data, rng)
    path.write_bytes(changed)
    return what


@contextmanager
def copied(folder: Path, place: Path) -> Iterator[Path]:
    """A copy of `folder` at `place` that may be damaged, removed afterwards."""
    shutil.copytree(folder, place)
    try:
        yield place
    finally:
        shutil.rmtree(place)

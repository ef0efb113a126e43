"""Shards named one by one: brace patterns as webdataset and open_clip write them, single tars, and lists.

    train/{00000..00131}.tar          numbers with leading zeros, or {a,b}; several braces multiply
    one.tar::more/{0..9}.tar          a list, separated by "::"
    s3://bucket/data/{00..11}.tar     any URL that a folder of shards may have

A folder of shards and such names are the same to all that read shards. The shards of a selection are in the order of
their names. Their indices are those of the tars; only the manifest is the selection's own (manifest.py).
"""

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from openvision.errors import OpenVisionError

SEPARATOR = "::"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# More shards than any data set has: a range with a digit too many.
_MOST = 10_000_000


@dataclass(frozen=True)
class Selection:
    """Tars below one folder or URL."""

    base: str
    """The deepest folder or URL that holds all of them."""
    tars: tuple[str, ...]
    """Names relative to `base`, sorted."""


def names_tars(source: str | os.PathLike[str]) -> bool:
    """Whether `source` names tars instead of a folder; a folder that exists is one, whatever its name."""
    text = os.fspath(source)
    looks = SEPARATOR in text or text.endswith(".tar") or ("{" in text and ".tar" in text)
    return looks and not os.path.isdir(text)


def holds_shards(source: str | Path) -> bool:
    """Whether `source` is a URL, names tars, or is a folder with tars."""
    return "://" in str(source) or names_tars(source) or any(Path(source).glob("*.tar"))


def select(source: str) -> Selection:
    """The tars that `source` names; raises OpenVisionError for a name that is not a tar's or is named twice."""
    tars = [tar for piece in source.split(SEPARATOR) for tar in expand(piece.strip())]
    for tar in tars:
        if not tar.endswith(".tar"):
            raise OpenVisionError(
                f"data source {source!r} names {tar!r}, which is no .tar file; name one folder, or tars alone"
            )
    if len(set(tars)) < len(tars):
        twice = next(tar for tar in tars if tars.count(tar) > 1)
        raise OpenVisionError(f"data source {source!r} names {twice} twice; name every shard once")
    tars = [tar if "://" in tar else os.path.normpath(tar) for tar in tars]
    base = _common([posixpath.dirname(tar) for tar in tars])
    return Selection(base, tuple(sorted(tar[len(base) :].lstrip("/") for tar in tars)))


def flat_name(tar: str) -> str:
    """Name of a shard in a folder that holds all of a selection: `more/0.tar` is `more-0.tar` there."""
    return tar.replace("/", "-")


def check_flat(tars: Sequence[str]) -> None:
    """Raise OpenVisionError when two shards would have the same name in one folder."""
    seen: dict[str, str] = {}
    for tar in tars:
        if (other := seen.setdefault(flat_name(tar), tar)) != tar:
            raise OpenVisionError(f"shards {other} and {tar} would both be {flat_name(tar)} in one folder; rename one")


def _common(folders: list[str]) -> str:
    """The longest common beginning of whole parts; raises OpenVisionError where a URL or an absolute path has none."""
    parts = zip(*(folder.split("/") for folder in folders), strict=False)
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts)]
    rooted = len({folder[:1] == "/" for folder in folders}) > 1
    if rooted or (any("://" in folder for folder in folders) and len(common) < 3):
        raise OpenVisionError(
            f"shards in {folders[0]!r} and {folders[-1]!r} have no folder in common; name them as sources of a mixture"
        )
    return "/".join(common) or ("/" if folders[0].startswith("/") else "")


def expand(pattern: str) -> list[str]:
    """Every name that a pattern with braces stands for; raises OpenVisionError for a brace that cannot be read."""
    match = _BRACES.search(pattern)
    if match is None:
        if "{" in pattern or "}" in pattern:
            raise OpenVisionError(f"data source {pattern!r} has an open brace; write e.g. {{00000..00131}}.tar")
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    rest = expand(after)
    options = _options(match[1], pattern)
    if len(options) * len(rest) > _MOST:
        raise OpenVisionError(f"data source {pattern!r} names more than {_MOST:,} shards; check its range")
    return [before + option + end for option in options for end in rest]


def _options(inside: str, pattern: str) -> Sequence[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds is None:
        if ".." in inside or "," not in inside:
            raise OpenVisionError(
                f"data source {pattern!r}: {{{inside}}} is neither a range such as {{00000..00131}} nor a list {{a,b}}"
            )
        return inside.split(",")
    first, last = int(bounds[1]), int(bounds[2])
    if first > last:
        raise OpenVisionError(f"data source {pattern!r}: range {{{inside}}} ends before it begins; swap its numbers")
    if last - first >= _MOST:
        raise OpenVisionError(f"data source {pattern!r} names more than {_MOST:,} shards; check its range")
    width = len(bounds[1])
    return [f"{number:0{width}d}" for number in range(first, last + 1)]

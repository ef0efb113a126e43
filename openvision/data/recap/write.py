"""Join one shard: choose the row for each sample, fix mojibake, and write a captions tar or a new shard.

Two kinds of mojibake occur in the release, and are fixed only where there is no doubt. UTF-8 bytes spelt out as text
(`CLR\\xc2\\xae`) are fixed wherever the bytes make characters. UTF-8 read as Windows-1252 (`cafÃ©`) can look like
correct text (`NESCAFÉ®` and `AMANHÃ…` are valid UTF-8 when encoded as Windows-1252), so a text is fixed only if it has
a sequence that no correct text has, and all of it can be decoded again.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from openvision.data.recap.index import JOIN_FIELDS, TarSample, digest, identity, tar_samples
from openvision.data.recap.table import EXAMPLES, ORIGINAL_CAPTION
from openvision.data.shards.dataset import ShardWriter
from openvision.data.shards.index import captions_name, index_name, is_key
from openvision.data.shards.selection import flat_name
from openvision.data.shards.store import LocalStore, Store
from openvision.data.shards.tar import open_tar
from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_text
from openvision.untrusted import decode_text, load_json, one_line, safe_name

# Longest key with its extension in a header.
_KEY_BYTES = 90
_ESCAPED = re.compile(r"(?:\\x[89A-Fa-f][0-9A-Fa-f])+")


def _windows_bytes() -> dict[str, int]:
    table = {chr(code): code for code in range(256)}
    for code in range(0x80, 0xA0):
        # Five codes have no character in Windows-1252; programs keep them as control characters.
        table[bytes([code]).decode("cp1252", errors="ignore") or chr(code)] = code
    return table


_BYTES = _windows_bytes()
_TAIL = "[" + re.escape("".join(character for character, code in _BYTES.items() if 0x80 <= code < 0xC0)) + "]"
# A euro sign or low quote after a-circumflex, eth before Y-diaeresis, a capital in a small word, a control character.
_PROOF = re.compile(rf"â[€‚„]{_TAIL}|ðŸ{_TAIL}{_TAIL}|[a-z][ÂÃ]{_TAIL}|[À-ô][\x80-\x9f]")


def fix_mojibake(text: str) -> str:
    """Fix what is provably decoded with the wrong encoding; other text is returned as it is."""
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


Mode = Literal["sidecar", "shards", "dry-run"]
Row = JsonObject
"""A row of the recaption table."""


@dataclass(frozen=True)
class JoinSpec:
    """Parameters of the join, the same for every shard."""

    by: str
    captions: tuple[tuple[str, str], ...]
    """Columns of the table and the names under which they are stored."""
    mode: Mode
    output: Path | None
    """Folder of the new shards (mode "shards")."""
    disk_placeholders: frozenset[int]
    table_placeholders: frozenset[int]


@dataclass
class ShardReport:
    """Counts of one shard, and the first keys for each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, key: str) -> None:
        """Count a sample without a caption."""
        self.counts[reason] += 1
        if len(listed := self.examples.setdefault(reason, [])) < EXAMPLES:
            listed.append(key)


def write_shard(spec: JoinSpec, store: Store, name: str, places: np.ndarray, rows: list[Row], report: Path) -> None:
    """Join one shard and write its captions; the file `report` is written last and marks the shard as finished.

    `rows` are the spilled rows of the shard, and `places` the positions of their samples in it, sorted.
    """
    result = ShardReport()
    joined = _joined(spec, store, name, places, rows, result)
    if spec.mode == "shards":
        assert spec.output is not None
        write_new_shard(spec.output, name, joined)
    else:
        captions: dict[str, JsonObject] = {sample.key: {**texts} for sample, _, texts in joined}
        if spec.mode == "sidecar":
            _write_sidecar(store, name, captions, [caption for _, caption in spec.captions])
    atomic_write_text(report, json.dumps({"counts": result.counts, "examples": result.examples}))


def _joined(
    spec: JoinSpec, store: Store, name: str, places: np.ndarray, rows: list[Row], report: ShardReport
) -> Iterator[tuple[TarSample, JsonObject, dict[str, str]]]:
    """Samples with their json and their captions; all others are counted."""
    seen: set[str] = set()
    for position, sample in enumerate(tar_samples(store, name)):
        report.counts["samples"] += 1
        start, end = np.searchsorted(places, [position, position + 1])
        meta = sample.meta()
        if not is_key(sample.key):
            report.drop("bad_name", sample.key)
        elif sample.key in seen:
            report.drop("duplicate_key", sample.key)
        elif meta is None:
            report.drop("bad_json", sample.key)
        else:
            row = _choose(spec, sample, meta, rows[start:end])
            if isinstance(row, str):
                report.drop(row, sample.key)
            else:
                report.counts["joined"] += 1
                report.counts["several_rows"] += int(end - start > 1)
                yield sample, meta, _captions(spec, row, report)
        seen.add(sample.key)


def _choose(spec: JoinSpec, sample: TarSample, meta: JsonObject, rows: list[Row]) -> Row | str:
    """The row for a sample, or the reason why there is none."""
    own = sample.identities(meta)
    if own[spec.by] is None:
        return "no_join_value"
    if digest(own["hash"] or "", "hash") in spec.disk_placeholders:
        return "placeholder"
    # The lookup compared 64 bits; now the whole values are compared.
    rows = [row for row in rows if _identity(row, spec.by) == own[spec.by]]
    if not rows:
        return "no_row"
    # Such a caption describes a placeholder image, whatever image the url gives today.
    rows = [row for row in rows if digest(_identity(row, "hash") or "", "hash") not in spec.table_placeholders]
    if not rows:
        return "placeholder"
    if spec.by == "key":
        # img2dataset numbers its downloads: another download gives the same key to another image.
        rows = [row for row in rows if not _contradicts(row, own)]
        if not rows:
            return "another_image"
    return _agreeing(spec, rows, own, decode_text(sample.texts.get("txt", b""))[0])


def _identity(row: Row, by: str) -> str | None:
    return identity(row.get(JOIN_FIELDS[by]), by)


def _contradicts(row: Row, own: dict[str, str | None]) -> bool:
    """Whether hash and url show another image: at least one is known, and none is equal."""
    compared = [_identity(row, by) == own[by] for by in ("hash", "url") if _identity(row, by) and own[by]]
    return bool(compared) and not any(compared)


def _agreeing(spec: JoinSpec, rows: list[Row], own: dict[str, str | None], alt: str) -> Row | str:
    """The row that agrees most with the sample; a reason when several agree and their captions differ."""

    def agreement(row: Row) -> int:
        same = sum(_identity(row, by) == own[by] is not None for by in JOIN_FIELDS)
        return same + (bool(alt) and fix_mojibake(row.get(ORIGINAL_CAPTION) or "").strip() == fix_mojibake(alt).strip())

    best = max(agreement(row) for row in rows)
    rows = [row for row in rows if agreement(row) == best]
    main = spec.captions[0][0]
    return rows[0] if len({fix_mojibake(row[main]) for row in rows}) == 1 else "differing_captions"


def _captions(spec: JoinSpec, row: Row, report: ShardReport) -> dict[str, str]:
    captions = {}
    for column, name in spec.captions:
        text = row.get(column) or ""
        if text.strip():
            captions[name] = fix_mojibake(text)
            report.counts["mended"] += captions[name] != text
    return captions


def _write_sidecar(store: Store, name: str, captions: dict[str, JsonObject], names: list[str]) -> None:
    """Write the captions tar of a shard; captions under other names that it already holds are kept."""
    target = captions_name(name)
    kept = read_captions(store, target) if store.exists(target) else {}
    for key, texts in kept.items():
        others = {caption: text for caption, text in texts.items() if caption not in names}
        captions[key] = others | captions.get(key, {})
    if isinstance(store, LocalStore):
        # It is outdated by the new captions; without it the shard is indexed again.
        Path(store.join(index_name(name))).unlink(missing_ok=True)
    store.write(target, captions_tar(captions))


def captions_tar(captions: dict[str, JsonObject]) -> bytes:
    """Bytes of a captions tar: KEY.json for each key that has captions, sorted."""
    buffer = io.BytesIO()
    # As USTAR, but for names of more than 100 bytes, which foreign shards have.
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key in sorted(key for key, texts in captions.items() if texts):
            data = json.dumps(captions[key], ensure_ascii=False, sort_keys=True).encode("utf-8", "backslashreplace")
            # A fresh TarInfo has time, user and mode fixed: the same captions give the same bytes.
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read_captions(store: Store, name: str) -> dict[str, JsonObject]:
    """The captions in a captions tar, by key; raises OpenVisionError for one that is damaged."""
    captions: dict[str, JsonObject] = {}
    with open_tar(store, name) as members:
        for member in members:
            try:
                texts = load_json(member.read())
            except ValueError as error:
                raise _bad_sidecar(store, name, f"{one_line(member.name)} is not JSON: {error}") from error
            if not isinstance(texts, dict):
                raise _bad_sidecar(store, name, f"{one_line(member.name)} is not a JSON object")
            captions[member.name.removesuffix(".json")] = texts
    return captions


def _bad_sidecar(store: Store, name: str, reason: str) -> OpenVisionError:
    return OpenVisionError(f"captions tar {store.join(name)} cannot be read: {reason}; remove the file")


def write_new_shard(output: Path, name: str, joined: Iterable[tuple[TarSample, JsonObject, JsonObject]]) -> None:
    """Write the joined samples as shard `name` of the folder `output`; no shard without a joined sample."""
    name = flat_name(name)
    stem = name.removesuffix(".tar")
    folder = output / f".{stem}.tmp"
    # Left behind by a killed process.
    shutil.rmtree(folder, ignore_errors=True)
    # One tar in, one tar out: no limit on samples.
    keys: set[str] = set()
    with ShardWriter(folder, samples_per_shard=2**62) as writer:
        for sample, meta, captions in joined:
            alt = decode_text(sample.texts.get("txt", b""))[0]
            key = _flat(sample.key, keys)
            keys.add(key)
            writer.write(key, sample.image(), sample.extension, alt, meta | captions)
    if (folder / "000000.tar").exists():
        (output / index_name(name)).unlink(missing_ok=True)
        os.replace(folder / "000000.tar", output / name)
        os.replace(folder / index_name("000000.tar"), output / index_name(name))
    shutil.rmtree(folder)


def _flat(key: str, taken: set[str]) -> str:
    """A key that the writer takes: a folder inside the tar is part of a key, and of any length."""
    flat = key.replace("/", "-")
    if "." not in flat and flat and len(flat.encode()) <= _KEY_BYTES and flat not in taken:
        return flat
    stem = safe_name(flat).replace(".", "-").encode()[:40].decode("utf-8", "ignore")
    return f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

"""Shards from what people have: a table with paths, a folder of pictures, a Hugging Face dataset (make_sources.py).

    OUT/train/000000.tar ...        the samples
    OUT/validation/000000.tar ...   with a hold-out: the same share of pictures every time, chosen by their keys
    OUT/rejects.jsonl               what could not be used and why, when there was any
    OUT/make.json                   how OUT was made, and counts

- A key is made of the picture's path as the source gives it (of its bytes where there is no path), so it stays the same
  when rows are added, removed or reordered. Further texts of the same picture get -2, -3, ... and stay in its split.
- A jpg, png or webp that decodes is stored as it is, byte for byte; anything else becomes a PNG.
- OUT is complete or not there at all.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from openvision.data.shards.dataset import ShardWriter
from openvision.data.tools.rows import Row, Rows
from openvision.errors import OpenVisionError
from openvision.files import atomic_folder, atomic_write_text
from openvision.images.decode import BadSampleError, decode_image

TRAIN, VALIDATION = "train", "validation"

# Formats that a shard stores, by Pillow's name. MPO is what phones write: a JPEG with a second picture behind it.
_STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# Others that are read. Not all that Pillow knows: for some of them it would start another program.
_CONVERTED = ("GIF", "BMP", "TIFF", "PPM", "AVIF")
_MAX_FILE_BYTES = 2**28
_JPEG_QUALITY = 95
_CHUNK = 128


@dataclass(frozen=True)
class Picture:
    """A picture as it goes into a shard."""

    data: bytes
    extension: str
    change: str | None = None
    """`converted` or `downscaled` when the bytes are not those of the source."""


@dataclass(frozen=True)
class _Ready:
    """A row whose picture was read."""

    row: Row
    base: str
    """Key of the picture; that of the sample is this one, or this one with a number."""
    picture: Picture


@dataclass
class Made:
    """What came of it."""

    samples: Counter[str] = field(default_factory=Counter)
    """By split."""
    changed: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, str]] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        """Rows that could not be used, by reason."""
        return Counter(reject["reason"] for reject in self.rejects)

    def reject(self, bad: BadSampleError) -> None:
        """Note a row that cannot be used."""
        self.rejects.append({"reason": bad.reason, "detail": str(bad)})


def make_shards(
    rows: Rows,
    out: Path,
    *,
    holdout: float = 0.0,
    max_side: int | None = None,
    samples_per_shard: int = 10_000,
    threads: int = 2,
    description: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Made:
    """Write OUT from `rows`; `progress` is told how many rows are done.

    Raises OpenVisionError, and leaves nothing, when OUT exists, when no row can be used or when a split stays empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OpenVisionError(f"{out} exists; remove it or choose another folder")
    made = Made()
    with atomic_folder(out) as folder:
        with _Writers(folder, holdout, samples_per_shard) as writers:
            for number, ready in enumerate(_prepared(rows, max_side, threads), start=1):
                if isinstance(ready, BadSampleError):
                    made.reject(ready)
                else:
                    _write(ready, writers, made)
                if progress:
                    progress(number)
        _check_splits(made, holdout)
        if made.rejects:
            lines = (json.dumps(reject, ensure_ascii=False) for reject in made.rejects)
            atomic_write_text(folder / "rejects.jsonl", "".join(f"{line}\n" for line in lines))
        counts = {"samples": dict(made.samples), "rejected": dict(made.reasons), "changed": dict(made.changed)}
        options = {"holdout": holdout, "max_side": max_side}
        content = json.dumps({**(description or {}), **options, **counts}, ensure_ascii=False, indent=2)
        atomic_write_text(folder / "make.json", content + "\n")
    return made


def stable_key(identity: str) -> str:
    """Key of a picture: the readable part of its name, and a hash that tells it from others of that name."""
    stem = re.sub(r"[^a-z0-9]+", "-", Path(identity).stem.lower())[:40].strip("-")
    digest = hashlib.sha256(identity.encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
    return f"{stem}-{digest}" if stem else digest


def is_held_out(key: str, share: float) -> bool:
    """Whether a picture belongs to the validation split; depends on nothing but its key."""
    return int.from_bytes(hashlib.sha256(f"holdout {key}".encode()).digest()[:8], "big") < share * 2**64


def prepare_picture(data: bytes, max_side: int | None = None) -> Picture:
    """The bytes to store for a picture, checked by decoding it; raises BadSampleError."""
    kind = _format_of(data)
    pixels = decode_image(data)
    extension = _STORED.get(kind, "png")
    if max_side is not None and max(pixels.shape[:2]) > max_side:
        image = Image.fromarray(pixels)
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        extension = "jpg" if extension == "jpg" else "png"
        return Picture(_encode(image, extension), extension, "downscaled")
    if kind in _STORED:
        return Picture(data, extension)
    return Picture(_encode(Image.fromarray(pixels), "png"), "png", "converted")


def _format_of(data: bytes) -> str:
    try:
        Image.init()
        # Which formats Pillow knows depends on how it was built.
        known = [kind for kind in (*_STORED, *_CONVERTED) if kind in Image.OPEN]
        with Image.open(io.BytesIO(data), formats=known) as image:
            return str(image.format)
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_large", str(error)) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise BadSampleError("undecodable", f"the file is no picture of a known format: {error}") from error


def _encode(image: Image.Image, extension: str) -> bytes:
    buffer = io.BytesIO()
    if extension == "jpg":
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _read(picture: Path | bytes) -> bytes:
    if isinstance(picture, bytes):
        return picture
    # Neither folders nor devices: reading some of those never ends.
    if not picture.is_file():
        raise BadSampleError("missing_file", f"{picture} does not exist or is no file")
    if picture.stat().st_size > _MAX_FILE_BYTES:
        raise BadSampleError("too_large", f"{picture} has more than {_MAX_FILE_BYTES} bytes")
    return picture.read_bytes()


def _prepare(row: Row | BadSampleError, max_side: int | None) -> _Ready | BadSampleError:
    """A row with its picture, or what is wrong with it."""
    if isinstance(row, BadSampleError):
        return row
    try:
        if not row.alts:
            raise BadSampleError("empty_text", "there is no text")
        data = _read(row.picture)
        base = stable_key(row.identity) if row.identity is not None else hashlib.sha256(data).hexdigest()[:24]
        return _Ready(row, base, prepare_picture(data, max_side))
    except BadSampleError as bad:
        return BadSampleError(bad.reason, f"{row.place}: {bad}")
    except (OSError, ValueError) as error:
        # A path that no file system can hold is a ValueError.
        return BadSampleError("missing_file", f"{row.place}: the picture cannot be read: {error}")


def _prepared(rows: Rows, max_side: int | None, threads: int) -> Iterator[_Ready | BadSampleError]:
    """Rows with their pictures, in order, read and decoded by threads a chunk at a time."""
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(rows, _CHUNK)):
            yield from pool.map(lambda row: _prepare(row, max_side), chunk)


def _write(ready: _Ready, writers: "_Writers", made: Made) -> None:
    # A shard holds one alt-text a sample: a picture with five captions is five samples.
    splits = [writers.write(ready, alt) for alt in ready.row.alts]
    if not any(splits):
        detail = f"{ready.row.place}: the same picture came with the same texts before"
        made.reject(BadSampleError("repeated_row", detail))
        return
    made.samples.update(split for split in splits if split)
    if ready.picture.change:
        made.changed[ready.picture.change] += 1


def _check_splits(made: Made, holdout: float) -> None:
    if not made.samples:
        reasons = ", ".join(f"{reason} {count}" for reason, count in made.reasons.most_common())
        first = f"; the first: {made.rejects[0]['detail']}" if made.rejects else ""
        raise OpenVisionError(f"no row can be used ({reasons or 'there is none'}){first}")
    for split in (TRAIN, *([VALIDATION] if holdout else [])):
        if not made.samples[split]:
            raise OpenVisionError(
                f"--holdout {holdout} leaves nothing for {split} of {made.samples.total()} samples; "
                "choose another share"
            )


class _Writers:
    """The shards of every split, opened when their first sample comes; knows which samples were written."""

    def __init__(self, folder: Path, holdout: float, samples_per_shard: int) -> None:
        self.folder, self.holdout, self.samples_per_shard = folder, holdout, samples_per_shard
        self._open: dict[str, ShardWriter] = {}
        self._stack = ExitStack()
        self._texts: Counter[str] = Counter()
        self._written: set[bytes] = set()

    def __enter__(self) -> "_Writers":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, ready: _Ready, alt: str) -> str | None:
        """Write one sample; the split it went to, or None when the same was written before."""
        row, base, picture = ready.row, ready.base, ready.picture
        content = hashlib.blake2b(json.dumps([base, alt, row.synthetic]).encode(), digest_size=16).digest()
        if content in self._written:
            return None
        self._written.add(content)
        self._texts[base] += 1
        key = base if self._texts[base] == 1 else f"{base}-{self._texts[base]}"
        split = VALIDATION if is_held_out(base, self.holdout) else TRAIN
        if split not in self._open:
            self._open[split] = self._stack.enter_context(ShardWriter(self.folder / split, self.samples_per_shard))
        meta = row.meta if row.synthetic is None else {**row.meta, "synthetic": row.synthetic}
        self._open[split].write(key, picture.data, picture.extension, alt, meta)
        return split

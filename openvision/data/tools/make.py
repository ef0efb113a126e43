"""`openvision data make`: shards from the rows of a table, an image folder or a Hugging Face dataset (readers.py).

    OUT/train/000000.tar ...        the samples
    OUT/validation/000000.tar ...   with --holdout: a fixed share of the images, chosen by their keys
    OUT/rejects.jsonl               rejected rows and the reasons, if any
    OUT/suspicious.jsonl            rows that are used although they look wrong, if any (verify.py)
    OUT/make.json                   options and counts

- A key is derived from the image's path in the source (from its bytes where there is no path), so it does not change
  when rows are added, removed or reordered. Further texts of an image get the suffixes -2, -3, ... and the same split.
- A jpg, png or webp that decodes is stored byte for byte; other formats become PNG.
- OUT appears only when it is complete.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import TracebackType

from PIL import Image

from openvision.data.shards.dataset import ShardWriter
from openvision.data.tools.readers import Row, Rows
from openvision.data.tools.verify import SUSPICIONS
from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_folder, atomic_write_text
from openvision.images.decode import BadSampleError, decode_image, has_gray_tail, read_header
from openvision.text.captions import non_blank
from openvision.untrusted import is_utf8, json_text

TRAIN, VALIDATION = "train", "validation"

# Formats that a shard stores; others become PNG. Phones write MPO: a JPEG with a second image appended.
_STORED = {"jpeg": "jpg", "mpo": "jpg", "png": "png", "webp": "webp"}
_MAX_FILE_BYTES = 2**28
_JPEG_QUALITY = 95
_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class ShardImage:
    """An encoded image for a shard."""

    data: bytes
    extension: str
    change: str | None = None
    """`converted` or `downscaled` when the bytes differ from those of the source."""
    remarks: tuple[str, ...] = ()
    """`gray_tail` when it looks like a JPEG that was cut."""


@dataclass(frozen=True)
class _LoadedRow:
    """A row with its image."""

    row: Row
    image_key: str
    """Key of the image; samples have this key, or this key with a number."""
    image: ShardImage


@dataclass
class MakeResult:
    """Counts and rejected rows."""

    samples: Counter[str] = field(default_factory=Counter)
    """By split."""
    changed: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, str]] = field(default_factory=list)
    suspicious: list[dict[str, str]] = field(default_factory=list)
    """Rows that are used although they look wrong."""

    @property
    def reasons(self) -> Counter[str]:
        """Rejected rows by reason."""
        return Counter(reject["reason"] for reject in self.rejects)

    def reject(self, bad: BadSampleError) -> None:
        """Record a rejected row."""
        self.rejects.append({"reason": bad.reason, "detail": str(bad)})


def make_shards(
    rows: Rows,
    out: Path,
    *,
    holdout: float = 0.0,
    max_side: int | None = None,
    samples_per_shard: int = 10_000,
    threads: int = 2,
    description: JsonObject | None = None,
    progress: Callable[[int], None] | None = None,
    not_taken: Counter[str] | None = None,
    without_text: bool = False,
) -> MakeResult:
    """Write shards into `out`; `progress` receives the number of rows done.

    `not_taken` counts the files that the reader of `rows` leaves out, by suffix. `without_text` keeps rows without a
    text, whose captions are still to be written.

    `holdout` is the share of images for validation, `max_side` the longest side in pixels, `description` goes into
    make.json. Raises OpenVisionError, and leaves nothing behind, when `out` exists, no row is usable, or a split would
    be empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OpenVisionError(f"{out} exists; remove it or choose another folder")
    result = MakeResult()
    with atomic_folder(out) as folder:
        with _SplitWriters(folder, holdout, samples_per_shard) as writers:
            for number, loaded in enumerate(_loaded(rows, max_side, threads, without_text), start=1):
                if isinstance(loaded, BadSampleError):
                    result.reject(loaded)
                else:
                    _write(loaded, writers, result)
                if progress:
                    progress(number)
        _check_splits(result, holdout)
        for name, listed in (("rejects.jsonl", result.rejects), ("suspicious.jsonl", result.suspicious)):
            if listed:
                atomic_write_text(folder / name, "".join(f"{json_text(one)}\n" for one in listed))
        counts = {
            "samples": dict(result.samples),
            "rejected": dict(result.reasons),
            "changed": dict(result.changed),
            "suspicious": dict(Counter(one["reason"] for one in result.suspicious)),
            "not_taken": dict(not_taken or {}),
        }
        options = {"holdout": holdout, "max_side": max_side}
        content = json_text({**(description or {}), **options, **counts}, indent=2)
        atomic_write_text(folder / "make.json", content + "\n")
    return result


def stable_key(identity: str) -> str:
    """Key of an image: the readable part of its file name and a hash of `identity`."""
    stem = re.sub(r"[^a-z0-9]+", "-", Path(identity).stem.lower())[:40].strip("-")
    digest = hashlib.sha256(identity.encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
    return f"{stem}-{digest}" if stem else digest


def is_held_out(key: str, share: float) -> bool:
    """Whether an image belongs to the validation split; depends on its key alone."""
    return int.from_bytes(hashlib.sha256(f"holdout {key}".encode()).digest()[:8], "big") < share * 2**64


def prepare_image(data: bytes, max_side: int | None = None) -> ShardImage:
    """The image to store, verified by decoding it; raises BadSampleError."""
    _, _, kind = read_header(data)
    pixels = decode_image(data)
    extension = _STORED.get(kind, "png")
    remarks = ("gray_tail",) if has_gray_tail(pixels) else ()
    if max_side is not None and max(pixels.shape[:2]) > max_side:
        image = Image.fromarray(pixels)
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        extension = "jpg" if extension == "jpg" else "png"
        return ShardImage(_encode(image, extension), extension, "downscaled", remarks)
    if kind in _STORED:
        return ShardImage(data, extension, remarks=remarks)
    return ShardImage(_encode(Image.fromarray(pixels), "png"), "png", "converted", remarks)


def _encode(image: Image.Image, extension: str) -> bytes:
    buffer = io.BytesIO()
    if extension == "jpg":
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _read(image: Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    # Neither folders nor devices: reading some of those never ends.
    if not image.is_file():
        raise BadSampleError("missing_file", f"{image} does not exist or is not a file")
    if image.stat().st_size > _MAX_FILE_BYTES:
        raise BadSampleError("too_large", f"{image} has more than {_MAX_FILE_BYTES} bytes")
    return image.read_bytes()


def _load(row: Row | BadSampleError, max_side: int | None, without_text: bool) -> _LoadedRow | BadSampleError:
    """A row with its image, or the error that makes it unusable."""
    if isinstance(row, BadSampleError):
        return row
    try:
        if not row.alts and without_text:
            row = replace(row, alts=[""])
        if not row.alts:
            raise BadSampleError("empty_text", "the row has no text")
        if not all(map(is_utf8, non_blank(row.synthetic) + row.alts)):
            raise BadSampleError("bad_text", "a text holds half a surrogate pair")
        data = _read(row.image)
        key = stable_key(row.identity) if row.identity is not None else hashlib.sha256(data).hexdigest()[:24]
        return _LoadedRow(row, key, prepare_image(data, max_side))
    except BadSampleError as bad:
        return BadSampleError(bad.reason, f"{row.place}: {bad}")
    except (OSError, ValueError) as error:
        # A path that no file system can hold is a ValueError.
        return BadSampleError("missing_file", f"{row.place}: the image cannot be read: {error}")


def _loaded(
    rows: Rows, max_side: int | None, threads: int, without_text: bool
) -> Iterator[_LoadedRow | BadSampleError]:
    """Rows with their images, in order, read and decoded in threads."""
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            yield from pool.map(lambda row: _load(row, max_side, without_text), some)


def _write(loaded: _LoadedRow, writers: "_SplitWriters", result: MakeResult) -> None:
    # A sample has one alt-text: an image with five captions becomes five samples.
    splits = [writers.write(loaded, alt) for alt in loaded.row.alts]
    if not any(splits):
        result.reject(BadSampleError("repeated_row", f"{loaded.row.place}: an earlier row has this image and text"))
        return
    result.samples.update(split for split in splits if split)
    if loaded.image.change:
        result.changed[loaded.image.change] += 1
    for remark in (*loaded.row.remarks, *loaded.image.remarks):
        result.suspicious.append({"reason": remark, "detail": f"{loaded.row.place} {SUSPICIONS[remark]}"})


def _check_splits(result: MakeResult, holdout: float) -> None:
    if not result.samples:
        reasons = ", ".join(f"{reason} {count}" for reason, count in result.reasons.most_common())
        first = f"; the first: {result.rejects[0]['detail']}" if result.rejects else ""
        raise OpenVisionError(f"no row can be used ({reasons or 'the source has none'}){first}")
    for split in (TRAIN, *([VALIDATION] if holdout else [])):
        if not result.samples[split]:
            raise OpenVisionError(
                f"--holdout {holdout} leaves nothing for {split} of {result.samples.total()} samples; "
                "choose another share"
            )


class _SplitWriters:
    """A shard writer for each split, opened with its first sample; skips samples that were written before."""

    def __init__(self, folder: Path, holdout: float, samples_per_shard: int) -> None:
        self.folder, self.holdout, self.samples_per_shard = folder, holdout, samples_per_shard
        self._open: dict[str, ShardWriter] = {}
        self._stack = ExitStack()
        self._texts: Counter[str] = Counter()
        self._written: set[bytes] = set()

    def __enter__(self) -> "_SplitWriters":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, loaded: _LoadedRow, alt: str) -> str | None:
        """Write one sample and return its split, or None when the same sample was written before."""
        row, base, image = loaded.row, loaded.image_key, loaded.image
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
        self._open[split].write(key, image.data, image.extension, alt, meta)
        return split

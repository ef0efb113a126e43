"""`openvision data preview`: an HTML page of model inputs: augmented crops from the Loader, and decoded token ids.

The first view of a sample is exactly that of the run at this position: crop, colour jitter and sentence. Further views
stand for later epochs: the same loader over the shown samples only, without the billion others in between. Text beyond
the context length is struck out.
"""

import base64
import io
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from openvision.data.batch import Batch
from openvision.data.distinct import Grid
from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.mixture import Ordering
from openvision.data.shards.dataset import Sample, ShardDataset, ShardWriter
from openvision.errors import OpenVisionError, require
from openvision.files import atomic_write_text
from openvision.images.decode import decode_image, read_header
from openvision.text.captions import non_blank, sentences
from openvision.text.tokenizer import Tokenizer

# Views up to this side are stored as PNG, larger ones as JPEG of high quality: a page stays below some 10 MB.
_LOSSLESS_SIDE = 128
_STORED_SIDE = 320
_MIME = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True)
class PreviewOptions:
    """What to show: the inputs of a run from `position` on."""

    inputs: InputSpec = field(default_factory=InputSpec)
    ordering: Ordering = field(default_factory=Ordering)
    grid: Grid | None = None
    """Batches of the run if none may hold an image twice: at the end of an epoch they change the order."""
    seed: int = 0
    position: int = 0
    """Position of the first sample in the run."""
    count: int = 64
    """Samples to show."""
    views: int = 4
    """Views of each sample."""

    @property
    def context_length(self) -> int:
        """Ids of a text. Without a text tower (OpenVision 2) texts are shown at the released models' length."""
        return self.inputs.context_length or 80


@dataclass(frozen=True)
class ReadText:
    """A text as the model reads it, and its truncated end."""

    read: str
    lost: str
    tokens: int
    """Tokens of the whole text."""


@dataclass(frozen=True)
class View:
    """One sample in one step: pixels uint8 (R, R, 3) and the texts beside it."""

    pixels: np.ndarray
    alt: ReadText
    sentence: ReadText
    target: ReadText | None


@dataclass(frozen=True)
class Card:
    """A sample as stored, and its views."""

    position: int
    """Position of the first view in the run."""
    sample: Sample
    views: list[View]


@dataclass(frozen=True)
class Preview:
    """The content of a page."""

    cards: list[Card]
    rejected: Counter[str]
    """Samples that were skipped, by reason."""


def build_preview(
    dataset: ShardDataset, tokenizer: Tokenizer, options: PreviewOptions, output: Path, facts: dict[str, str]
) -> Preview:
    """Write the page `output`, headed by `facts`; needs the extra `report`."""
    # Before the work, so that a missing library is reported at once.
    require("jinja2", extra="report")
    preview = collect(dataset, tokenizer, options)
    atomic_write_text(output, render(preview, options, facts))
    return preview


def collect(dataset: ShardDataset, tokenizer: Tokenizer, options: PreviewOptions) -> Preview:
    """The samples of the run from `options.position` on, with their views."""
    count = min(options.count, len(dataset))
    order = LoaderOptions(options.ordering, distinct=options.grid is not None, grid=options.grid)
    with _loader(dataset, tokenizer, options, count, options.position, order) as stream:
        batch = next(stream)
        starts = [stream.sample_at(options.position + row)[1] for row in range(count)]
    indices = [_index_of(dataset, key, start) for key, start in zip(batch.keys, starts, strict=True)]
    samples = {index: dataset[index] for index in indices}
    later = _later_views(samples, tokenizer, options)
    cards: dict[int, Card] = {}
    for row, index in enumerate(indices):
        # A sample that replaces a bad one may occur twice; its first occurrence is shown.
        if index not in cards:
            first = _view(batch, row, samples[index], tokenizer, options)
            cards[index] = Card(options.position + row, samples[index], [first, *later[index]])
    return Preview(list(cards.values()), batch.rejected)


def _loader(
    dataset: ShardDataset,
    tokenizer: Tokenizer,
    options: PreviewOptions,
    batch_size: int,
    start: int,
    order: LoaderOptions,
) -> Loader:
    inputs = replace(options.inputs, context_length=options.context_length)
    return Loader(dataset, tokenizer, inputs, batch_size=batch_size, seed=options.seed, start=start, options=order)


def _index_of(dataset: ShardDataset, key: str, start: int) -> int:
    """Index of the sample `key`: `start`, or a later one that replaced it."""
    return next(index for offset in range(len(dataset)) if dataset.key(index := (start + offset) % len(dataset)) == key)


def _later_views(samples: dict[int, Sample], tokenizer: Tokenizer, options: PreviewOptions) -> dict[int, list[View]]:
    """Views of each sample from further epochs over `samples` alone."""
    found: dict[int, list[View]] = {index: [] for index in samples}
    if options.views < 2:
        return found
    with tempfile.TemporaryDirectory(prefix="openvision-preview-") as name:
        folder = Path(name)
        _write_samples(samples, folder)
        # Beyond all positions shown, so that no first view is repeated.
        start = len(samples) * (1 + options.position // len(samples) + 1)
        order = LoaderOptions(distinct=False)
        with _loader(ShardDataset(folder), tokenizer, options, len(samples), start, order) as stream:
            for batch in islice(stream, options.views - 1):
                for row, key in enumerate(batch.keys):
                    index = int(key)
                    found[index].append(_view(batch, row, samples[index], tokenizer, options))
    return found


def _write_samples(samples: dict[int, Sample], folder: Path) -> None:
    with ShardWriter(folder) as writer:
        # In the order of the shards: when all samples are shown, the later views are those of the run's epochs.
        for index, sample in sorted(samples.items()):
            # Our writer refuses some keys of foreign shards: here the index is the key.
            alt = sample.alt if isinstance(sample.alt, str) else "\n".join(sample.alt)
            meta = {"synthetic": sample.synthetic} if sample.synthetic is not None else {}
            writer.write(str(index), sample.image, sample.extension, alt, meta)


def _view(batch: Batch, row: int, sample: Sample, tokenizer: Tokenizer, options: PreviewOptions) -> View:
    alts, whole = non_blank(sample.alt), " ".join(non_blank(sample.synthetic))
    pieces = sentences(whole) or alts
    # A text also has [bos], [eos] and the class token; a target has [eos] and is one position shorter.
    kept = options.context_length - 3
    target = None
    if options.inputs.caption_length is not None:
        ids = batch.labels[row].numpy()
        target = _read(tokenizer, ids, [whole] if whole else alts, options.inputs.caption_length - 2)
    return View(
        pixels=batch.images[row].permute(1, 2, 0).numpy(),
        alt=_read(tokenizer, batch.alt_ids[row].numpy(), alts, kept),
        sentence=_read(tokenizer, batch.sentence_ids[row].numpy(), pieces, kept),
        target=target,
    )


def _read(tokenizer: Tokenizer, ids: np.ndarray, candidates: Sequence[str], kept: int) -> ReadText:
    """The ids as text, with the truncated end of that text among `candidates` which they encode."""
    read = tokenizer.decode(ids)
    for tokens in tokenizer.tokens(candidates):
        if tokenizer.decode(tokens[:kept]) == read:
            return ReadText(read, tokenizer.decode(tokens[kept:]), len(tokens))
    return ReadText(read, "", int((ids != tokenizer.pad_id).sum()))


def render(preview: Preview, options: PreviewOptions, facts: dict[str, str]) -> str:
    """The page as self-contained HTML."""
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"stored": _stored_uri, "crop": _crop_uri, "size": _size}
    template = resources.files("openvision.data.tools").joinpath("preview.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        cards=preview.cards,
        position=options.position,
        resolution=options.inputs.resolution,
        context_length=options.context_length,
        caption_length=options.inputs.caption_length,
        facts=facts,
        rejected=sorted(preview.rejected.items()),
        lossless=options.inputs.resolution <= _LOSSLESS_SIDE,
        views=max((len(card.views) for card in preview.cards), default=0),
        cut=_truncated(preview.cards),
    )


def _truncated(cards: Sequence[Card]) -> dict[str, tuple[int, int]]:
    """Kind of text -> number truncated and number in all; sentences differ from view to view."""
    first = [card.views[0] for card in cards]
    texts = {
        "alt-texts": [view.alt for view in first],
        "sentences": [view.sentence for card in cards for view in card.views],
        "caption targets": [view.target for view in first if view.target is not None],
    }
    return {kind: (sum(bool(text.lost) for text in found), len(found)) for kind, found in texts.items()}


def _size(sample: Sample) -> str:
    width, height, kind = read_header(sample.image)
    return f"{width} × {height} {kind}"


def _stored_uri(sample: Sample) -> str:
    """The stored image: the file itself if it is small, else a smaller copy."""
    width, height, _ = read_header(sample.image)
    if max(width, height) <= _STORED_SIDE and sample.extension in _MIME:
        return _uri(sample.image, _MIME[sample.extension])
    image = Image.fromarray(decode_image(sample.image))
    image.thumbnail((_STORED_SIDE, _STORED_SIDE))
    return _encoded(image, lossless=False)


def _crop_uri(view: View) -> str:
    return _encoded(Image.fromarray(view.pixels), lossless=view.pixels.shape[0] <= _LOSSLESS_SIDE)


def _encoded(image: Image.Image, lossless: bool) -> str:
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=92, subsampling=0)
    return _uri(buffer.getvalue(), "image/png" if lossless else "image/jpeg")


def _uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def learn_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A tokenizer for a page without a recipe; raises OpenVisionError when there is no text to learn from."""
    if not any(text.strip() for text in texts):
        raise OpenVisionError("the shards have no text to learn a vocabulary from; name a tokenizer with --tokenizer")
    return Tokenizer.train(texts, vocab_size)

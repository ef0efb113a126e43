"""A page that shows what a model is fed: crops as the Loader makes them, and ids turned back into texts.

The first view of every sample is the one that the run sees at that position, crop, colours and sentence alike. The
further views are what later epochs see: the same loader over the shown samples alone, so that nobody has to wait for a
billion others in between. Texts longer than the model reads show the part that is lost.
"""

import base64
import io
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from openvision.data.loader import Batch, Loader
from openvision.data.shards.dataset import Sample, ShardDataset, ShardWriter
from openvision.data.tools.stats import as_texts, read_header
from openvision.errors import OpenVisionError, require
from openvision.files import atomic_write_text
from openvision.images.augment import Augment
from openvision.images.decode import decode_image
from openvision.text.captions import sentences
from openvision.text.tokenizer import Tokenizer

# Views up to this side are stored without loss, larger ones as fine JPEGs: a page stays below some 10 MB.
_LOSSLESS_SIDE = 128
_STORED_SIDE = 320
_MIME = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True)
class Feed:
    """How samples become what the model reads: the data side of a recipe's stage."""

    resolution: int = 224
    context_length: int = 80
    caption_length: int | None = 128
    """Positions of the decoder's target; None without a decoder."""
    augment: Augment = field(default_factory=Augment)
    seed: int = 0
    position: int = 0
    """Of the first sample in the run."""


@dataclass(frozen=True)
class Text:
    """A text as the model reads it, and the end it never sees."""

    read: str
    lost: str
    tokens: int
    """Of the whole text."""


@dataclass(frozen=True)
class View:
    """One sample in one step: pixels uint8 (R, R, 3) and the texts beside it."""

    pixels: np.ndarray
    alt: Text
    sentence: Text
    target: Text | None


@dataclass(frozen=True)
class Card:
    """A sample as stored, and its views."""

    position: int
    """In the run, of the first view."""
    sample: Sample
    views: list[View]


@dataclass(frozen=True)
class Preview:
    """Everything the page shows."""

    cards: list[Card]
    rejected: Counter[str]
    """Samples that were passed over for these, by reason."""


def build_preview(
    dataset: ShardDataset,
    tokenizer: Tokenizer,
    feed: Feed,
    output: Path,
    facts: dict[str, str],
    count: int = 64,
    views: int = 4,
) -> Preview:
    """Write the page `output`, with `facts` told at its head; the rest as `look` takes it. Needs the extra `report`."""
    # Before the work: a missing library is told at once.
    require("jinja2", extra="report")
    preview = look(dataset, tokenizer, feed, count, views)
    atomic_write_text(output, render(preview, feed, facts))
    return preview


def look(dataset: ShardDataset, tokenizer: Tokenizer, feed: Feed, count: int = 64, views: int = 4) -> Preview:
    """The samples that the run sees from `feed.position` on, with `views` views of each."""
    count = min(count, len(dataset))
    with _loader(dataset, tokenizer, feed, count, feed.position) as stream:
        batch = next(stream)
        starts = [stream.sample_at(feed.position + row)[1] for row in range(count)]
    indices = [_index_of(dataset, key, start) for key, start in zip(batch.keys, starts, strict=True)]
    samples = {index: dataset[index] for index in indices}
    later = _later_views(samples, tokenizer, feed, views - 1)
    cards: dict[int, Card] = {}
    for row, index in enumerate(indices):
        # A sample that stands in for a bad one may come twice; its first turn is shown.
        if index not in cards:
            first = _view(batch, row, samples[index], tokenizer, feed)
            cards[index] = Card(feed.position + row, samples[index], [first, *later[index]])
    return Preview(list(cards.values()), Counter(reject.reason for reject in batch.rejects))


def _loader(dataset: ShardDataset, tokenizer: Tokenizer, feed: Feed, batch_size: int, start: int) -> Loader:
    return Loader(
        dataset,
        tokenizer,
        resolution=feed.resolution,
        batch_size=batch_size,
        context_length=feed.context_length,
        caption_length=feed.caption_length,
        augment=feed.augment,
        seed=feed.seed,
        start=start,
    )


def _index_of(dataset: ShardDataset, key: str, start: int) -> int:
    """Number of the sample `key`, which is `start` or, where that one is bad, one of those after it."""
    return next(index for offset in range(len(dataset)) if dataset.key(index := (start + offset) % len(dataset)) == key)


def _later_views(samples: dict[int, Sample], tokenizer: Tokenizer, feed: Feed, epochs: int) -> dict[int, list[View]]:
    """What `epochs` further passes over `samples` make of each."""
    found: dict[int, list[View]] = {index: [] for index in samples}
    if epochs < 1:
        return found
    with tempfile.TemporaryDirectory(prefix="openvision-preview-") as name:
        folder = Path(name)
        _write_samples(samples, folder)
        # A later position of the stream than any shown: none of the first views is drawn again.
        start = len(samples) * (1 + feed.position // len(samples) + 1)
        with _loader(ShardDataset(folder), tokenizer, feed, len(samples), start) as stream:
            for batch in islice(stream, epochs):
                for row, key in enumerate(batch.keys):
                    index = int(key)
                    found[index].append(_view(batch, row, samples[index], tokenizer, feed))
    return found


def _write_samples(samples: dict[int, Sample], folder: Path) -> None:
    with ShardWriter(folder) as writer:
        # In the order of the shards: when all samples are shown, the later views are those of the run's own epochs.
        for index, sample in sorted(samples.items()):
            # Keys of other programs' shards may hold what our writer refuses: the number of the sample is its key here.
            alt = sample.alt if isinstance(sample.alt, str) else "\n".join(sample.alt)
            meta = {"synthetic": sample.synthetic} if sample.synthetic is not None else {}
            writer.write(str(index), sample.image, sample.extension, alt, meta)


def _view(batch: Batch, row: int, sample: Sample, tokenizer: Tokenizer, feed: Feed) -> View:
    alts, whole = as_texts(sample.alt), " ".join(as_texts(sample.synthetic))
    pieces = sentences(whole) or alts
    # Of a row of ids [bos], [eos] and the class token are not the text's own; a target has [eos] and one position less.
    kept = feed.context_length - 3
    target = None
    if feed.caption_length is not None:
        ids = batch.labels[row].numpy()
        target = _read(tokenizer, ids, [whole] if whole else alts, feed.caption_length - 2)
    return View(
        pixels=batch.images[row].permute(1, 2, 0).numpy(),
        alt=_read(tokenizer, batch.alt_ids[row].numpy(), alts, kept),
        sentence=_read(tokenizer, batch.sentence_ids[row].numpy(), pieces, kept),
        target=target,
    )


def _read(tokenizer: Tokenizer, ids: np.ndarray, candidates: Sequence[str], kept: int) -> Text:
    """The ids as text, with the lost end of the one of `candidates` that they were made from."""
    read = tokenizer.decode(ids)
    for tokens in tokenizer.tokens(candidates):
        if tokenizer.decode(tokens[:kept]) == read:
            return Text(read, tokenizer.decode(tokens[kept:]), len(tokens))
    return Text(read, "", int((ids != tokenizer.pad_id).sum()))


def render(preview: Preview, feed: Feed, facts: dict[str, str]) -> str:
    """The page as HTML that needs nothing but itself."""
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"stored": _stored_uri, "crop": _crop_uri, "size": _size}
    template = resources.files("openvision.data.tools").joinpath("preview.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        cards=preview.cards,
        feed=feed,
        facts=facts,
        rejected=sorted(preview.rejected.items()),
        lossless=feed.resolution <= _LOSSLESS_SIDE,
        views=max((len(card.views) for card in preview.cards), default=0),
        cut=_cut(preview.cards),
    )


def _cut(cards: Sequence[Card]) -> dict[str, tuple[int, int]]:
    """Kind of text -> how many of how many lost their end; a sentence is another one in every view."""
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
    """The stored picture: the file itself while it is small, else a smaller copy."""
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
    """A vocabulary for a page without a recipe; raises OpenVisionError when there is no text to learn from."""
    if not any(text.strip() for text in texts):
        raise OpenVisionError("the shards hold no text to learn a vocabulary from; give one with --tokenizer")
    return Tokenizer.train(texts, vocab_size)

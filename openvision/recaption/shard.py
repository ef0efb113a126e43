"""One shard on its way: the questions about its images, the answers, and what is written when all are there."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from openvision.data.recap.index import TarSample, tar_samples
from openvision.data.recap.write import captions_tar, read_captions, write_new_shard
from openvision.data.shards.index import captions_name, is_key
from openvision.data.shards.selection import flat_name
from openvision.data.shards.store import Store
from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_bytes, atomic_write_text
from openvision.images.decode import BadSampleError, decode_image
from openvision.recaption.captioners.captioner import Answer, Question
from openvision.recaption.prompts import Prompt
from openvision.recaption.quality import find_fault
from openvision.untrusted import decode_text


@dataclass(frozen=True)
class Options:
    """How captions are made and kept."""

    key: str = "recaption"
    """Name of the caption; `KEY_by` says who wrote it."""
    per_image: int = 1
    seed: int = 0
    retries: int = 1
    """How often a bad caption is asked for once more."""
    on_bad: Literal["drop", "keep"] = "drop"
    language: str | None = "en"
    """Captions clearly in another one are bad; None: any is good."""
    form: Literal["captions", "shards"] = "captions"
    """Captions tars beside links to the originals, or new shards with everything inside."""


@dataclass(frozen=True)
class Origin:
    """Who writes the captions of a job."""

    captioner: str
    can_retry: bool
    prompt: Prompt


@dataclass
class _Caption:
    text: str
    seed: int
    retries: int


class ShardWork:
    """The captions of one shard."""

    def __init__(self, store: Store, name: str, origin: Origin, options: Options) -> None:
        self.store, self.name, self.origin, self.options = store, name, origin, options
        self.counts: Counter[str] = Counter()
        self._captions: dict[str, dict[int, _Caption]] = {}
        self._open = 0
        self._ended = False
        self._began = time.time()

    @property
    def is_complete(self) -> bool:
        """Whether every question was asked and answered."""
        return self._ended and not self._open

    def questions(self) -> Iterator[Question]:
        """The questions about the images that can be read; raises OpenVisionError when there is none."""
        seen: set[str] = set()
        for sample in tar_samples(self.store, self.name):
            image = sample.image()
            try:
                if not is_key(sample.key) or sample.key in seen:
                    raise BadSampleError("bad_key", "the name is no key, or repeated")
                decode_image(image)
            except BadSampleError:
                self.counts["unreadable"] += 1
                continue
            seen.add(sample.key)
            self.counts["images"] += 1
            alt = decode_text(sample.texts.get("txt", b""))[0].strip()
            for number in range(self.options.per_image):
                prompt = self.origin.prompt.fill(alt, sample.key, number)
                seed = derive_seed(self.options.seed, self.name, sample.key, number)
                self._open += 1
                yield Question(self.name, sample.key, number, image, sample.extension, prompt, seed, alt)
        if not self.counts["images"]:
            raise OpenVisionError(
                f"shard {self.store.join(self.name)} holds no image that can be read; remove it from the folder"
            )
        self._ended = True

    def take(self, question: Question, answer: Answer) -> Question | None:
        """Keep or count an answer; a question when it is bad and worth another try."""
        self.counts["tokens_read"] += answer.tokens_read
        self.counts["tokens_written"] += answer.tokens_written
        fault = answer.fault or find_fault(answer.text, question.prompt, answer.cut, self.options.language)
        if fault and self.origin.can_retry and question.retry < self.options.retries:
            self.counts["retried"] += 1
            return replace(question, seed=derive_seed(question.seed, "again"), retry=question.retry + 1)
        self._open -= 1
        if fault:
            self.counts[f"bad_{fault}"] += 1
        # An empty text is no caption, whatever is kept.
        if fault is None or (self.options.on_bad == "keep" and answer.text.strip()):
            self.counts["captions"] += 1
            caption = _Caption(answer.text, question.seed, question.retry)
            self._captions.setdefault(question.key, {})[question.number] = caption
        return None

    def finish(self, output: Path, worker: str) -> None:
        """Write captions and report, then what marks the shard as finished; raises OpenVisionError without captions."""
        if not self._captions and self.counts["images"] > 1:
            # A captioner that is set up wrongly must not finish shard after shard without a caption.
            bad = sorted((name, number) for name, number in self.counts.items() if name.startswith("bad_"))
            found = ", ".join(f"{name} {number}" for name, number in bad)
            raise OpenVisionError(
                f"none of {self.counts['images']} images of shard {self.store.join(self.name)} got a usable caption "
                f"({found}); correct the captioner or the prompt, or keep bad captions with --on-bad keep"
            )
        beside = captions_name(self.name)
        captions = read_captions(self.store, beside) if self.store.exists(beside) else {}
        for key, numbered in self._captions.items():
            captions.setdefault(key, {}).update(self._fields([numbered[number] for number in sorted(numbered)]))
        counts = {name: number for name, number in self.counts.items() if number}
        report = {"counts": counts, "worker": worker, "began": self._began, "ended": time.time()}
        atomic_write_text(output / report_name(self.name), json.dumps(report, indent=2) + "\n")
        if self.options.form == "shards":
            write_new_shard(output, self.name, self._joined(captions))
            return
        ours = flat_name(self.name)
        atomic_write_bytes(output / captions_name(ours), captions_tar(captions))
        link = output / f"{ours}.link"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(self.store.join(self.name)).resolve())
        os.replace(link, output / ours)

    def _fields(self, captions: list[_Caption]) -> JsonObject:
        texts = [caption.text for caption in captions]
        origin: JsonObject = {
            "captioner": self.origin.captioner,
            "prompt_sha256": self.origin.prompt.sha256,
            "seeds": [caption.seed for caption in captions],
            "retries": [caption.retries for caption in captions],
        }
        key = self.options.key
        return {key: texts[0] if self.options.per_image == 1 else texts, f"{key}_by": origin}

    def _joined(self, captions: dict[str, JsonObject]) -> Iterator[tuple[TarSample, JsonObject, JsonObject]]:
        """The samples with an image that can be read; one without a caption stays a sample."""
        seen: set[str] = set()
        for sample in tar_samples(self.store, self.name):
            if not is_key(sample.key) or sample.key in seen:
                continue
            try:
                decode_image(sample.image())
            except BadSampleError:
                continue
            seen.add(sample.key)
            yield sample, sample.meta() or {}, captions.get(sample.key, {})


def is_finished(output: Path, name: str) -> bool:
    """Whether a shard has its captions: the link to it, or the new shard, is made last."""
    shard = output / flat_name(name)
    return shard.is_symlink() or shard.is_file()


def report_name(name: str) -> str:
    """Name of the counts of a shard."""
    return flat_name(name).removesuffix(".tar") + ".recaption.json"


def derive_seed(*parts: object) -> int:
    """31 bits that depend on the parts alone: the same whichever worker asks, and when."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1

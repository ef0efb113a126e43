"""Recaption a folder of shards: one shard after the other, by any number of workers at once.

The output folder holds, for each finished shard, `NAME.captions.tar`, `NAME.recaption.json` (its counts), and, made
last, a link `NAME.tar` to the shard: so it is a folder of shards for the loader at any time, and a shard without its
link is not finished. A worker holds a lock on the shard that it captions; the lock ends with its process.
"""

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from openvision.data.recap.index import shard_names, tar_samples
from openvision.data.recap.write import captions_tar, read_captions
from openvision.data.shards.index import captions_name, is_key
from openvision.data.shards.selection import check_flat, flat_name
from openvision.data.shards.store import LocalStore, open_store
from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_bytes, atomic_write_text, make_folder, read_json
from openvision.images.decode import BadSampleError, decode_image
from openvision.recaption.captioner import Answer, AnyCaptioner, Question
from openvision.recaption.prompts import Prompt
from openvision.recaption.quality import find_fault
from openvision.untrusted import decode_text

MANIFEST = "recaption.json"


@dataclass(frozen=True)
class Options:
    """How captions are made and kept."""

    key: str = "recaption"
    """Name of the caption."""
    per_image: int = 1
    batch_size: int = 32
    seed: int = 0
    on_bad: Literal["drop", "keep"] = "drop"


def recaption_shards(
    shards: str,
    captioner: AnyCaptioner,
    prompt: Prompt,
    output: Path,
    options: Options,
    progress: Callable[[str], None],
) -> Counter[str]:
    """Caption every shard that no other worker has finished or holds; returns the counts of all finished shards.

    `progress` receives a line for each shard. Raises OpenVisionError for remote shards, an output folder of another
    job, a shard without images, and whatever stops the captioner.
    """
    store = open_store(shards)
    if not isinstance(store, LocalStore):
        raise OpenVisionError(f"{shards} is not a local folder; copy the shards, then recaption the copy")
    if options.per_image > 1 and not captioner.samples:
        raise OpenVisionError(f"{captioner.name} gives one caption an image; leave out --per-image")
    names = shard_names(store)
    check_flat(names)
    if output.resolve() == store.folder.resolve():
        raise OpenVisionError(f"{output} is the folder of the shards; choose another output folder")
    _claim_folder(output, _manifest(store, captioner, prompt, options))
    for number, name in enumerate(names, start=1):
        with _lock(output / f".{flat_name(name)}.lock") as held:
            if not held or _is_finished(output, name):
                continue
            counts = _caption_shard(store, name, captioner, prompt, output, options)
        progress(f"{name} ({number} of {len(names)}): {counts['captions']} captions for {counts['images']} images")
    total: Counter[str] = Counter()
    for name in names:
        if _is_finished(output, name):
            total += Counter(read_json(output / _report_name(name))["counts"])
            total["shards"] += 1
    total["shards_missing"] = len(names) - total["shards"]
    return total


def _manifest(store: LocalStore, captioner: AnyCaptioner, prompt: Prompt, options: Options) -> JsonObject:
    # The size of a batch changes no caption.
    chosen = {name: value for name, value in asdict(options).items() if name != "batch_size"}
    source = {"shards": str(store.folder.resolve()), "captioner": captioner.name}
    return {"version": 1, **source, "prompt": prompt.text, "prompt_sha256": prompt.sha256, **chosen}


def _claim_folder(output: Path, manifest: JsonObject) -> None:
    """Make `output` the folder of this job; raises OpenVisionError when it is that of another one."""
    is_foreign = output.is_dir() and not (output / MANIFEST).exists() and not (output / ".job.lock").exists()
    if (output.exists() and not output.is_dir()) or (is_foreign and any(output.iterdir())):
        raise OpenVisionError(f"{output} exists and holds no recaption job; choose another output folder")
    make_folder(output)
    with _lock(output / ".job.lock", wait=True):
        if not (output / MANIFEST).exists():
            atomic_write_text(output / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        found = read_json(output / MANIFEST)
    for name, value in manifest.items():
        if found.get(name) != value:
            raise OpenVisionError(
                f"{output} belongs to another job: its {name} is {found.get(name)!r:.100}, not {value!r:.100}; choose "
                "another output folder, or give the options of that job"
            )


@contextmanager
def _lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock that ends with this process; False when another holds it. The file stays: removing it would race."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _is_finished(output: Path, name: str) -> bool:
    return (output / flat_name(name)).is_symlink()


def _report_name(name: str) -> str:
    return flat_name(name).removesuffix(".tar") + ".recaption.json"


def _caption_shard(
    store: LocalStore, name: str, captioner: AnyCaptioner, prompt: Prompt, output: Path, options: Options
) -> Counter[str]:
    counts: Counter[str] = Counter()
    beside = captions_name(name)
    texts: dict[str, list[str]] = {}
    questions = _questions(store, name, prompt, options, counts)
    while batch := list(islice(questions, options.batch_size)):
        for key, text in _good_captions(captioner, batch, options, counts):
            texts.setdefault(key, []).append(text)
    if not counts["images"]:
        raise OpenVisionError(f"shard {store.join(name)} holds no image that can be read; remove it from the folder")
    if not texts and counts["images"] > 1:
        # A captioner that is set up wrongly must not finish shard after shard without a caption.
        found = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()) if name.startswith("bad_"))
        raise OpenVisionError(
            f"none of {counts['images']} images of shard {store.join(name)} got a usable caption ({found}); correct "
            "the captioner or the prompt, or keep bad captions with --on-bad keep"
        )
    captions = read_captions(store, beside) if store.exists(beside) else {}
    for key, several in texts.items():
        captions.setdefault(key, {})[options.key] = several[0] if options.per_image == 1 else several
    atomic_write_text(output / _report_name(name), json.dumps({"counts": counts}, indent=2) + "\n")
    ours = flat_name(name)
    atomic_write_bytes(output / captions_name(ours), captions_tar(captions))
    link = output / f"{ours}.link"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(store.join(name)).resolve())
    os.replace(link, output / ours)
    return counts


def _questions(
    store: LocalStore, name: str, prompt: Prompt, options: Options, counts: Counter[str]
) -> Iterator[tuple[str, Question]]:
    seen: set[str] = set()
    for sample in tar_samples(store, name):
        image = sample.image()
        try:
            if not is_key(sample.key) or sample.key in seen:
                raise BadSampleError("bad_key", "the name is no key, or repeated")
            decode_image(image)
        except BadSampleError:
            counts["unreadable"] += 1
            continue
        seen.add(sample.key)
        counts["images"] += 1
        alt = decode_text(sample.texts.get("txt", b""))[0].strip()
        for number in range(options.per_image):
            seed = _seed(options.seed, name, sample.key, number)
            yield sample.key, Question(image, sample.extension, prompt.fill(alt), seed, alt)


def _seed(*parts: object) -> int:
    """31 bits that depend on the parts alone: the same whichever worker asks, and when."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1


def _good_captions(
    captioner: AnyCaptioner, batch: list[tuple[str, Question]], options: Options, counts: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Ask, ask once more where the caption is bad, and give what is kept, with its key."""
    answers = captioner.ask([question for _, question in batch])
    faults = [_fault(question, answer) for (_, question), answer in zip(batch, answers, strict=True)]
    if captioner.samples and (bad := [i for i, fault in enumerate(faults) if fault]):
        again = [replace(batch[i][1], seed=_seed(batch[i][1].seed, "again"), retry=True) for i in bad]
        counts["retried"] += len(bad)
        for i, question, answer in zip(bad, again, captioner.ask(again), strict=True):
            answers[i], faults[i] = answer, _fault(question, answer)
    for (key, _), answer, fault in zip(batch, answers, faults, strict=True):
        if fault:
            counts[f"bad_{fault}"] += 1
        # An empty text is no caption, whatever is kept.
        if fault is None or (options.on_bad == "keep" and answer.text.strip()):
            counts["captions"] += 1
            yield key, answer.text


def _fault(question: Question, answer: Answer) -> str | None:
    return answer.fault or find_fault(answer.text, question.prompt, answer.cut)

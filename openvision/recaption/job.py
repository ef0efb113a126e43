"""Recaption a folder of shards, by any number of workers at once.

The output folder holds, for each finished shard, `NAME.recaption.json` (its counts), its captions, and, made last,
`NAME.tar`: a link to the shard, or a new one. So it is a folder of shards for the loader at any time, and a shard
without `NAME.tar` is not finished. A worker holds a lock on each shard that it captions; the lock ends with its
process.
"""

import fcntl
import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from openvision.data.recap.index import shard_names
from openvision.data.shards.selection import check_flat, flat_name
from openvision.data.shards.store import LocalStore, Store, open_store
from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_text, make_folder, read_json
from openvision.recaption.captioners.captioner import Answer, AnyCaptioner, Question
from openvision.recaption.prompts import Prompt
from openvision.recaption.shard import Options, Origin, ShardWork, is_finished, report_name

MANIFEST = "recaption.json"
_JOB_LOCK = ".job.lock"
# Seconds between the signs of life that a worker writes into the locks it holds.
_SIGN = 5.0

Write = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """One of `of` shares of the shards, the same for every worker that lists the same folder."""

    number: int
    """From 1."""
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """The part that `3/16` names; raises OpenVisionError for anything else."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise OpenVisionError(f"--part is {text!r:.40}; write the number of this worker and of all, e.g. 3/16")
        return cls(int(number), int(of))

    def share(self, names: Sequence[str]) -> Sequence[str]:
        """Every `of`-th name: shards that are near each other take similar time."""
        return names[self.number - 1 :: self.of]


def recaption_shards(
    shards: str,
    captioner: AnyCaptioner,
    prompt: Prompt,
    output: Path,
    options: Options,
    progress: Write,
    names: Sequence[str] | None = None,
    budget: int | None = None,
    part: Part | None = None,
) -> Counter[str]:
    """Caption every shard that no other worker has finished or holds; returns the counts of all finished shards.

    `progress` receives a line for each shard; `names` are the shards to look at, by default all, or those of `part`,
    which are then all that is counted. `budget` is how many tokens all workers together may use: no shard begins after
    them. Raises OpenVisionError for remote shards that are to be linked to, an output folder of another job, a shard
    without images, a budget that is used up, and whatever stops the captioner.
    """
    store = open_shards(shards, options)
    if options.per_image > 1 and not captioner.varies:
        raise OpenVisionError(
            f"{captioner.name} gives equal captions of one image; leave out --per-image or set --temperature 0.7"
        )
    every = shard_names(store)
    check_flat(every)
    if isinstance(store, LocalStore) and output.resolve() == store.folder.resolve():
        raise OpenVisionError(f"{output} is the folder of the shards; choose another output folder")
    _claim_folder(output, _manifest(store, captioner, prompt, options))
    origin = Origin(captioner.name, captioner.can_retry, prompt)
    mine = every if part is None else part.share(every)
    with _Worker(store, output, origin, options, captioner.shards_at_once, budget, progress) as worker:
        for question, answer in captioner.answers(worker.questions(mine if names is None else names)):
            worker.take(question, answer)
    return count_finished(output, mine)


def open_shards(shards: str, options: Options) -> Store:
    """The folder or URL of shards; raises OpenVisionError for a remote one to whose shards links are to be made."""
    if "@" in urlsplit(shards).netloc:
        # It would stand in the manifest.
        raise OpenVisionError("the URL of the shards has a user name, which would be stored; use the environment")
    store = open_store(shards)
    if options.form == "captions" and not isinstance(store, LocalStore):
        raise OpenVisionError(
            f"{shards} is not a local folder, so no link can lead there; write new shards with --as shards"
        )
    return store


def count_finished(output: Path, names: Sequence[str]) -> Counter[str]:
    """Sum of the counts of all finished shards, with `shards` and `shards_missing`."""
    total: Counter[str] = Counter()
    for name in names:
        if is_finished(output, name):
            total += Counter(read_json(output / report_name(name))["counts"])
            total["shards"] += 1
    total["shards_missing"] = len(names) - total["shards"]
    return total


@dataclass(frozen=True)
class _Held:
    work: ShardWork
    lock: IO[str]
    stack: ExitStack


class _Worker:
    """Takes shards one after the other, a second one while the first only waits for its last answers."""

    def __init__(
        self,
        store: Store,
        output: Path,
        origin: Origin,
        options: Options,
        at_once: int,
        budget: int | None,
        progress: Write,
    ) -> None:
        self.store, self.output, self.origin, self.options = store, output, origin, options
        self.at_once, self.budget, self.progress = at_once, budget, progress
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._held: dict[str, _Held] = {}
        self._again: deque[Question] = deque()
        self._signed = 0.0

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_error: object) -> None:
        for name in list(self._held):
            self._release(name)

    def questions(self, names: Sequence[str]) -> Iterator[Question | None]:
        """Questions about all shards that are free; None where an answer must come before the next one."""
        remaining = iter(names)
        more, broken = True, None
        while True:
            while more and len(self._held) < self.at_once:
                name = None
                try:
                    name = next((name for name in remaining if self._hold(name)), None)
                    more = name is not None
                    for question in self._held[name].work.questions() if name is not None else ():
                        yield question
                        yield from self._second_tries()
                except OpenVisionError as error:
                    # What was asked about the other shards may have cost money: they are finished first.
                    broken, more = error, False
                    if name is not None:
                        self._release(name)
                else:
                    # Every answer may have come before the shard ended.
                    if name is not None:
                        self._finish_complete(name)
            yield from self._second_tries()
            if self._held:
                yield None
            elif broken is not None:
                raise broken
            elif not more:
                return

    def _second_tries(self) -> Iterator[Question]:
        while self._again:
            yield self._again.popleft()

    def take(self, question: Question, answer: Answer) -> None:
        """Keep an answer, and finish its shard after the last one."""
        held = self._held.get(question.shard)
        if held is None:
            # Its shard turned out to be broken.
            return
        again = held.work.take(question, answer)
        if again is not None:
            self._again.append(again)
        self._sign()
        self._finish_complete(question.shard)

    def _finish_complete(self, name: str) -> None:
        work = self._held[name].work
        if work.is_complete:
            work.finish(self.output, self.name)
            self._release(name)
            self.progress(f"{name}: {work.counts['captions']} captions for {work.counts['images']} images")

    def _hold(self, name: str) -> bool:
        """Lock a shard, unless it is finished or another worker holds it."""
        if is_finished(self.output, name):
            return False
        self._check_budget()
        stack = ExitStack()
        file = stack.enter_context(_lock(lock_path(self.output, name)))
        # It may have been finished between the look and the lock.
        if file is None or is_finished(self.output, name):
            stack.close()
            return False
        self._held[name] = _Held(ShardWork(self.store, name, self.origin, self.options), file, stack)
        self._signed = 0.0
        self._sign()
        return True

    def _release(self, name: str) -> None:
        held = self._held.pop(name)
        held.lock.truncate(0)
        held.stack.close()

    def _sign(self) -> None:
        """Say in the held locks how far their shards are, for the table of progress."""
        if time.monotonic() - self._signed < _SIGN:
            return
        self._signed = time.monotonic()
        for held in self._held.values():
            counts = held.work.counts
            sign = {"worker": self.name, "captions": counts["captions"], "tokens": _tokens(counts)}
            held.lock.truncate(0)
            held.lock.write(json.dumps(sign))
            held.lock.flush()

    def _check_budget(self) -> None:
        if self.budget is None:
            return
        finished = count_finished(self.output, shard_names(self.store))
        used = _tokens(finished) + sum(_tokens(held.work.counts) for held in self._held.values())
        if used >= self.budget:
            raise OpenVisionError(
                f"{used:,} of {self.budget:,} tokens are used; raise --budget and run the same command to go on"
            )


def _tokens(counts: Counter[str]) -> int:
    return counts["tokens_read"] + counts["tokens_written"]


def lock_path(output: Path, name: str) -> Path:
    """The lock of a shard."""
    return output / f".{flat_name(name)}.lock"


def _manifest(store: Store, captioner: AnyCaptioner, prompt: Prompt, options: Options) -> JsonObject:
    place = str(store.folder.resolve()) if isinstance(store, LocalStore) else store.name
    source = {"shards": place, "captioner": captioner.name}
    return {"version": 1, **source, "prompt": prompt.text, "prompt_sha256": prompt.sha256, **asdict(options)}


def _claim_folder(output: Path, manifest: JsonObject) -> None:
    """Make `output` the folder of this job; raises OpenVisionError when it is that of another one."""
    # Looked at once: another worker may be the first one just now, and its lock comes before all else.
    held = {path.name for path in output.iterdir()} if output.is_dir() else set[str]()
    is_foreign = bool(held) and not held & {MANIFEST, _JOB_LOCK}
    if (output.exists() and not output.is_dir()) or is_foreign:
        raise OpenVisionError(f"{output} exists and holds no recaption job; choose another output folder")
    make_folder(output)
    with _lock(output / _JOB_LOCK, wait=True):
        if not (output / MANIFEST).exists():
            atomic_write_text(output / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        # An option that the folder was written without had its default.
        found = asdict(Options()) | read_json(output / MANIFEST)
    for name, value in manifest.items():
        if found.get(name) != value:
            raise OpenVisionError(
                f"{output} belongs to another job: its {name} is {found.get(name)!r:.100}, not {value!r:.100}; choose "
                "another output folder, or give the options of that job"
            )


@contextmanager
def _lock(path: Path, wait: bool = False) -> Iterator[IO[str] | None]:
    """Hold a lock that ends with this process; None when another holds it. The file stays: removing it would race."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        except OSError as error:
            raise OpenVisionError(
                f"{path.parent} cannot be locked: {error.strerror}; choose an output folder on a file system with flock"
            ) from error
        else:
            yield file

"""How far a job is, over all its workers, from the reports of finished shards and the locks of those in progress."""

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from openvision.data.recap.index import shard_names
from openvision.data.shards.store import open_store
from openvision.errors import OpenVisionError
from openvision.files import JsonObject, read_json
from openvision.recaption.job import MANIFEST, lock_path
from openvision.recaption.shard import is_finished, report_name

# A worker signs its locks every few seconds; a shard takes longer than this only where the captioner hangs.
_ALIVE = 120.0
_HOUR = 3600.0


@dataclass
class WorkerProgress:
    """What one process did."""

    counts: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    began: float = float("inf")
    ended: float = 0.0
    """Seconds since 1970, of its first and last shard."""
    holds: tuple[str, ...] = ()
    """Shards that it captions now."""

    @property
    def seconds(self) -> float:
        """Time that it worked."""
        return max(self.ended - self.began, 1e-9)

    @property
    def rate(self) -> float:
        """Images a second; 0 before the first shard."""
        return self.counts["images"] / self.seconds if self.shards else 0.0


@dataclass(frozen=True)
class Prices:
    """What a job costs, in any currency."""

    read: float = 0.0
    """A million tokens that the model reads."""
    written: float = 0.0
    hour: float = 0.0
    """An hour of one worker."""

    def cost(self, workers: list[WorkerProgress]) -> float:
        """Of all tokens and hours of finished shards."""
        read = sum(worker.counts["tokens_read"] for worker in workers)
        written = sum(worker.counts["tokens_written"] for worker in workers)
        hours = sum(worker.seconds for worker in workers if worker.shards) / _HOUR
        return (read * self.read + written * self.written) / 1e6 + hours * self.hour


@dataclass(frozen=True)
class Progress:
    """A job."""

    shards: int
    workers: dict[str, WorkerProgress]

    @property
    def finished(self) -> int:
        """Finished shards."""
        return sum(worker.shards for worker in self.workers.values())

    @property
    def total(self) -> Counter[str]:
        """Counts of all finished shards."""
        return sum((worker.counts for worker in self.workers.values()), Counter())

    @property
    def rate(self) -> float:
        """Images a second of the workers that are at work now."""
        return sum(worker.rate for worker in self.workers.values() if worker.holds)

    @property
    def seconds_left(self) -> float | None:
        """Until the last shard is finished; None where nobody works, or no shard says yet how long one takes."""
        if self.finished == self.shards:
            return 0.0
        if not self.finished or not self.rate:
            return None
        return (self.shards - self.finished) * (self.total["images"] / self.finished) / self.rate

    def cost_at_the_end(self, prices: Prices) -> float | None:
        """What the whole job will have cost; None before the first shard."""
        return prices.cost(list(self.workers.values())) * self.shards / self.finished if self.finished else None


def read_progress(output: Path) -> Progress:
    """Progress of the job in `output`; raises OpenVisionError when it holds none."""
    if not (output / MANIFEST).is_file():
        raise OpenVisionError(f"{output} holds no recaption job; name the output folder of `openvision recaption`")
    names = shard_names(open_store(str(read_json(output / MANIFEST)["shards"])))
    workers: dict[str, WorkerProgress] = {}
    for name in names:
        if is_finished(output, name):
            _add(workers, read_json(output / report_name(name)))
        elif (holder := _holder(lock_path(output, name))) is not None:
            worker = workers.setdefault(holder, WorkerProgress())
            worker.holds = (*worker.holds, name)
    return Progress(len(names), workers)


def _add(workers: dict[str, WorkerProgress], report: JsonObject) -> None:
    # Reports of earlier versions do not say who wrote them.
    worker = workers.setdefault(str(report.get("worker", "unknown")), WorkerProgress())
    worker.counts += Counter(report["counts"])
    worker.shards += 1
    worker.began = min(worker.began, float(report.get("began", 0)))
    worker.ended = max(worker.ended, float(report.get("ended", 0)))


def _holder(lock: Path) -> str | None:
    """Who captions a shard now: the lock itself is not tried, as that would keep it from a worker."""
    try:
        if time.time() - lock.stat().st_mtime > _ALIVE:
            return None
        return str(json.loads(lock.read_text(encoding="utf-8"))["worker"])
    # No lock, an empty one, or one that is being written.
    except (OSError, ValueError, KeyError, TypeError):
        return None
